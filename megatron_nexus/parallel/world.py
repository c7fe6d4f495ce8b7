"""World: which rank of how many this process is, as its launcher says it through the environment.

Known launchers: deepspeed and torchrun (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_*), Open MPI
(OMPI_COMM_WORLD_*), MPICH and Intel MPI (PMI_*). Imports no torch: it runs before anything heavy.
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_nexus.errors import ConfigError

FIRST_PORT = 20000
PORTS = 20000


@dataclass(frozen=True)
class World:
    """This process among all: `launcher` is "none" where nothing but a shell started it."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int


def read_world(environment: Mapping[str, str]) -> World:
    """The world that the environment describes.

    Raises ConfigError where a launcher's variables are incomplete.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
        return _world(launcher, environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", _LOCAL_SIZES)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = [f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return _world("mpirun", environment, *names[:3], names[3:])
    if "PMI_SIZE" in environment:
        return _world("mpirun", environment, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ["MPI_LOCALNRANKS"])
    # An sbatch script sets SLURM_NTASKS too; only a task that srun started has a step of its own.
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_NUM_TASKS", "0") != "0":
        return _world(
            "srun",
            environment,
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_LOCALID",
            ["SLURM_NTASKS_PER_NODE"],
        )
    return World("none", 0, 1, 0, 1, "127.0.0.1", 0)


_LOCAL_SIZES = ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"]


def _world(
    launcher: str,
    environment: Mapping[str, str],
    rank: str,
    size: str,
    local_rank: str,
    local_sizes: list[str],
) -> World:
    missing = [name for name in (rank, size, local_rank) if name not in environment]
    if missing:
        raise ConfigError(
            [
                f"{launcher} set no {name} in the environment: start all ranks with one launcher"
                for name in missing
            ]
        )
    world_size = int(environment[size])
    locals_given = [int(environment[name]) for name in local_sizes if environment.get(name, "").isdigit()]
    return World(
        launcher=launcher,
        rank=int(environment[rank]),
        size=world_size,
        local_rank=int(environment[local_rank]),
        local_size=locals_given[0] if locals_given else world_size,
        master_addr=environment.get("MASTER_ADDR") or _master_address(environment, world_size),
        master_port=int(environment.get("MASTER_PORT") or _job_port(environment)),
    )


def _master_address(environment: Mapping[str, str], world_size: int) -> str:
    """The first host of a SLURM job; otherwise this machine, which is right for one-host MPI runs only."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if hosts:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True
        )
        return listed.stdout.split()[0]
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", environment.get("MPI_LOCALNRANKS", world_size)))
    if local < world_size:
        raise ConfigError(
            ["mpirun spans several hosts and MASTER_ADDR is not set: add -x MASTER_ADDR=<first host>"]
        )
    return "127.0.0.1"


def _job_port(environment: Mapping[str, str]) -> int:
    """A port that all ranks of one job agree on and two jobs of one host are unlikely to share."""
    job = environment.get("SLURM_JOB_ID") or environment.get("OMPI_MCA_ess_base_jobid") or str(_parent_pid())
    return FIRST_PORT + int(job) % PORTS


def _parent_pid() -> int:
    """The launcher's process id: the same for all ranks on one host."""
    return int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[1])

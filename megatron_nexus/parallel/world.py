"""World: which rank of how many this process is, as its launcher says it through the environment.

Known launchers: deepspeed and torchrun (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_*), Open MPI
(OMPI_COMM_WORLD_*), MPICH and Intel MPI (PMI_*). Imports no torch: it runs before anything heavy.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_nexus.errors import ConfigError

PORTS = range(20_000, 30_000)
"""Ports for the ranks to meet: below those that Linux hands out to connections (32768 and up)."""
_STEP_STRIDE = 211

LAUNCHER = "MEGATRON_NEXUS_LAUNCHER"
"""Set to "local" for the ranks that `local_ranks` starts."""

LISTENER = "MEGATRON_NEXUS_LISTENER"
"""The descriptor of the socket that `local_ranks` hands to rank 0: it listens at MASTER_PORT already."""


@dataclass(frozen=True)
class World:
    """This process among all: `launcher` is "none" where nothing but a shell started it.

    `listener` is the descriptor of a socket that listens at `master_port` already, for rank 0 to serve.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    listener: int | None = None


@dataclass(frozen=True)
class _Names:
    """The variables in which a launcher gives a process its rank; those of the local size may be missing."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: tuple[str, ...]


_TORCH = _Names("deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_OPEN_MPI = _Names(
    "mpirun",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_MPICH = _Names("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",))
_SRUN = _Names(
    "srun",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
)


def read_world(environment: Mapping[str, str]) -> World:
    """Return the world that the environment describes.

    Raises ConfigError where a launcher's variables are incomplete.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        launcher = (
            "torchrun" if "TORCHELASTIC_RUN_ID" in environment else environment.get(LAUNCHER, "deepspeed")
        )
        return _world(replace(_TORCH, launcher=launcher), environment)
    if _OPEN_MPI.size in environment:
        return _world(_OPEN_MPI, environment)
    # An sbatch script sets SLURM_NTASKS too; only a task that srun started is in a step with tasks. Of the
    # two that set PMI_*, srun leaves MPICH's local rank out, and mpirun inside a job sets all of them.
    in_step = _SRUN.rank in environment and _SRUN.size in environment
    if _MPICH.size in environment and (_MPICH.local_rank in environment or not in_step):
        return _world(_MPICH, environment)
    if in_step:
        return _world(_SRUN, environment)
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _world(_TORCH, environment)
    return World("none", 0, 1, 0, 1, "127.0.0.1", 0)


def _world(names: _Names, environment: Mapping[str, str]) -> World:
    required = [names.rank, names.size, names.local_rank]
    if environment.get("MASTER_PORT"):
        required.append("MASTER_PORT")
    missing = [name for name in required if not environment.get(name, "").isdigit()]
    if missing:
        raise ConfigError(
            [
                f"{names.launcher} left {name} at {environment.get(name, 'nothing')!r}, not a number: "
                "start all ranks with one launcher"
                for name in missing
            ]
        )
    rank, size = int(environment[names.rank]), int(environment[names.size])
    if rank >= size:
        raise ConfigError(
            f"{names.rank} {rank} is not below {names.size} {size}: number the ranks from 0 to {size - 1}"
        )
    # "4(x2)" in SLURM's variable: four tasks on each of two hosts.
    counts = [re.match(r"\d+", environment.get(name, "")) for name in names.local_size]
    local_sizes = [int(count[0]) for count in counts if count]
    port = int(environment.get("MASTER_PORT") or _job_port(environment))
    if not 1 <= port <= 65535:
        raise ConfigError(f"MASTER_PORT {port} is not a port: use one from 1 to 65535")
    return World(
        launcher=names.launcher,
        rank=rank,
        size=size,
        local_rank=int(environment[names.local_rank]),
        local_size=local_sizes[0] if local_sizes else size,
        master_addr=environment.get("MASTER_ADDR") or _master_address(environment, size),
        master_port=port,
        listener=int(environment[LISTENER]) if LISTENER in environment else None,
    )


def _master_address(environment: Mapping[str, str], world_size: int) -> str:
    """The first host of a SLURM job; otherwise this machine, which is right for one-host MPI runs only."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if hosts:
        command = ["scontrol", "show", "hostnames", hosts]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigError(
                f"{' '.join(command)} failed ({error}): set MASTER_ADDR to the first of these hosts"
            ) from error
        return listed.stdout.split()[0]
    local = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", environment.get("MPI_LOCALNRANKS", world_size)))
    if local < world_size:
        raise ConfigError(
            "mpirun spans several hosts and MASTER_ADDR is not set: add -x MASTER_ADDR=<first host> "
            "-x MASTER_PORT=<port>"
        )
    return "127.0.0.1"


def _job_port(environment: Mapping[str, str]) -> int:
    """A port that all ranks of one job agree on and two jobs of one host are unlikely to share.

    Without a job's number it follows from the launcher, the parent of all ranks on one host.
    """
    job = environment.get("SLURM_JOB_ID") or environment.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
    step = environment.get("SLURM_STEP_ID") or "0"  # two steps of one job may run side by side
    return PORTS[(int(job) + _STEP_STRIDE * int(step)) % len(PORTS)]

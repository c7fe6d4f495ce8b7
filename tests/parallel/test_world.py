"""A process knows its place from its launcher's variables, or says which of them is wrong."""

import os
from pathlib import Path

import pytest

from megatron_nexus.errors import ConfigError
from megatron_nexus.parallel.world import PORTS, World, read_world

ADDRESS = {"MASTER_ADDR": "node-1", "MASTER_PORT": "12345"}
TORCH = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **ADDRESS}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_ID": "777123",
}


@pytest.mark.parametrize(
    ("environment", "launcher", "local_size"),
    [
        ({**TORCH, "LOCAL_SIZE": "4", "CROSS_RANK": "1"}, "deepspeed", 4),
        ({**TORCH, "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}, "torchrun", 4),
        (TORCH, "deepspeed", 8),
        ({**OPEN_MPI, **ADDRESS}, "mpirun", 4),
        ({**MPICH, **ADDRESS}, "mpirun", 4),
        ({**SRUN, **ADDRESS}, "srun", 4),
    ],
)
def test_each_launcher_s_variables_are_understood(
    environment: dict[str, str], launcher: str, local_size: int
) -> None:
    assert read_world(environment) == World(launcher, 5, 8, 1, local_size, "node-1", 12345)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HOME": "/root", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},  # the script of an sbatch job
        {"LOCAL_RANK": "0", **ADDRESS},
    ],
)
def test_without_a_launcher_a_process_is_alone(environment: dict[str, str]) -> None:
    world = read_world(environment)
    assert (world.launcher, world.rank, world.size, world.local_size) == ("none", 0, 1, 1)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({**TORCH, **SRUN}, "deepspeed"),  # torchrun or deepspeed in an srun step
        ({**OPEN_MPI, **SRUN, **ADDRESS}, "mpirun"),  # Open MPI starts its daemons with srun
        ({**MPICH, **SRUN, **ADDRESS}, "mpirun"),  # so does MPICH
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8", **ADDRESS}, "srun"),  # srun --mpi=pmi2
        ({**SRUN, "WORLD_SIZE": "8", **ADDRESS}, "srun"),  # exported by a script, without RANK
    ],
)
def test_of_nested_launchers_the_innermost_counts(environment: dict[str, str], launcher: str) -> None:
    world = read_world(environment)
    assert (world.launcher, world.rank, world.size, world.local_rank) == (launcher, 5, 8, 1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["deepspeed left LOCAL_RANK at 'nothing'"]),
        ({"RANK": "1"}, ["left WORLD_SIZE at 'nothing'", "left LOCAL_RANK at 'nothing'"]),
        ({"WORLD_SIZE": "2"}, ["left RANK at 'nothing'", "left LOCAL_RANK at 'nothing'"]),
        ({**TORCH, "RANK": "one"}, ["left RANK at 'one'"]),
        ({**TORCH, "RANK": "-1"}, ["left RANK at '-1'"]),
        ({**TORCH, "RANK": "8"}, ["RANK 8 is not below WORLD_SIZE 8: number the ranks from 0 to 7"]),
        ({**TORCH, "MASTER_PORT": "http"}, ["left MASTER_PORT at 'http'"]),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, ["mpirun left MPI_LOCALRANKID at 'nothing'"]),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ["left OMPI_COMM_WORLD_RANK", "left OMPI_COMM_WORLD_LOCAL_RANK"]),
        ({**SRUN, "SLURM_LOCALID": ""}, ["srun left SLURM_LOCALID at ''"]),
        ({**OPEN_MPI}, ["several hosts and MASTER_ADDR is not set: add -x MASTER_ADDR="]),
        ({**MPICH}, ["several hosts and MASTER_ADDR is not set"]),
    ],
)
def test_incomplete_variables_are_named(environment: dict[str, str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_world(environment)
    assert len(caught.value.problems) == len(expected)
    for part, problem in zip(expected, caught.value.problems, strict=True):
        assert part in problem


def test_ranks_of_one_machine_meet_there_on_a_port_of_their_launcher() -> None:
    environments = [
        {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
        for rank in range(8)
    ]
    places = {(world.master_addr, world.master_port) for world in map(read_world, environments)}
    assert places == {("127.0.0.1", PORTS[os.getppid() % len(PORTS)])}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that alone is searched for commands; a test puts its `scontrol` there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "scontrol"


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("mpi", [{}, OPEN_MPI])
def test_ranks_of_a_slurm_job_meet_on_its_first_host_on_a_port_of_the_job(
    scontrol: Path, mpi: dict[str, str]
) -> None:
    write_program(scontrol, '[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"')
    world = read_world({**SRUN, **mpi, "SLURM_STEP_NODELIST": "gpu[07-08]"})
    assert (world.master_addr, world.master_port) == ("gpu07", PORTS[777123 % len(PORTS)])


@pytest.mark.parametrize("body", [None, "exit 1"])
def test_a_slurm_job_whose_hosts_nobody_tells_needs_an_address(scontrol: Path, body: str | None) -> None:
    if body is not None:
        write_program(scontrol, body)
    with pytest.raises(ConfigError, match=r"scontrol show hostnames gpu\[07-08\] failed .*: set MASTER_ADDR"):
        read_world({**SRUN, "SLURM_STEP_NODELIST": "gpu[07-08]"})


def test_two_steps_of_one_job_do_not_meet_on_one_port() -> None:
    job = {**SRUN, "MASTER_ADDR": "node-1"}
    ports = {read_world({**job, "SLURM_STEP_ID": str(step)}).master_port for step in range(4)}
    assert len(ports) == 4

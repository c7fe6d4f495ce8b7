"""Cores are shared among the ranks that may use them, bound or not; the versions of torch that are tested."""

import os
import tomllib
from pathlib import Path
from unittest import mock

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.training.machine import (
    TESTED_TORCH,
    compile_problem,
    set_environment,
    set_trace_prefix,
    threads_of_rank,
    untested_torch,
)
from tests.support.paths import REPOSITORY

ALL = list(range(8))


@pytest.mark.parametrize(
    ("on_host", "threads"),
    [
        ([ALL], [8]),
        ([ALL, ALL], [4, 4]),  # nobody is bound
        ([ALL[:4], ALL[4:]], [4, 4]),  # srun --cpus-per-task=4, mpirun --bind-to socket
        ([ALL[:2], ALL[2:]], [2, 6]),
        ([ALL[:4]] * 2 + [ALL[4:]] * 2, [2, 2, 2, 2]),  # two ranks a socket
        ([ALL[:2]] * 3, [1, 1, 1]),  # more ranks than cores
        ([ALL] * 3, [2, 2, 2]),
    ],
)
def test_a_rank_gets_its_share_of_its_own_cores(on_host: list[list[int]], threads: list[int]) -> None:
    assert [threads_of_rank(mine, on_host) for mine in on_host] == threads


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("2.9.1", True),
        ("2.10.0+cu128", False),
        ("2.11.0", False),
        ("2.13.1+cpu", False),
        ("2.14.0a0+gitabc", True),
        ("3.0", True),
    ],
)
def test_a_torch_that_is_not_tested_is_a_warning(version: str, warned: bool) -> None:
    assert ("2.10 to 2.13" in untested_torch(version)) is warned


def test_the_range_is_what_is_installed_and_tested() -> None:
    """The package's requirement begins at the oldest, the pins are the newest, and CI installs the oldest."""
    oldest, newest = TESTED_TORCH
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"torch>={oldest}" in project["dependencies"]
    assert f"\ntorch=={newest}." in (REPOSITORY / "requirements.txt").read_text()
    assert f"\ntorch=={oldest}." in (REPOSITORY / "tests" / "oldest_torch.txt").read_text()


@pytest.mark.parametrize(
    ("words", "version", "device", "remedy"),
    [
        ("--tp 2", "2.11.0+cu130", "cuda", "add --sequence-parallel, drop --compile"),
        ("--tp 2 --sequence-parallel", "2.11.0+cu130", "cuda", ""),
        ("--tp 1", "2.11.1", "cuda", ""),
        ("--tp 2", "2.10.0", "cuda", "install torch 2.13"),
        ("--tp 1", "2.10.0", "cuda", ""),
        ("--tp 2", "2.13.0", "cuda", ""),
        ("", "2.13.0", "cpu", "there is no no-such-compiler: install it"),
    ],
)
def test_compile_is_refused_where_it_would_be_wrong_or_fail(
    words: str, version: str, device: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = build(given_flags(["--compile", *words.split()]))
    problem = compile_problem(config, version, device)
    assert remedy in problem and bool(problem) is bool(remedy)


RECORDER = {
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "/runs/a/nccl_trace_rank_",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/runs/a/nccl_trace_rank_",
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, RECORDER),
        (
            {
                "TORCH_FR_BUFFER_SIZE": "50",
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
                "TORCH_FR_DUMP_TEMP_FILE": "/x",
            },
            {
                "TORCH_FR_BUFFER_SIZE": "50",
                "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
                "TORCH_FR_DUMP_TEMP_FILE": "/x",
            },
        ),
    ],
)
def test_the_flight_recorder_is_on_and_writes_into_the_run_unless_the_user_says_else(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    with mock.patch.dict(os.environ, given, clear=True):
        set_environment(build(given_flags([])))
        set_trace_prefix(Path("/runs/a"))
        assert {name: value for name, value in os.environ.items() if name.startswith("TORCH_")} == expected

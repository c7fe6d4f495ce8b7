"""apex is taken for NVIDIA's only where it is NVIDIA's, with its extensions, for a CUDA device."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_nexus.errors import ConfigError
from megatron_nexus.models.nvidia_apex import require_apex

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FLAGS = ["--norm-impl", "--optimizer-impl"]
NVIDIAS = ("apex/__init__.py", "apex/optimizers/__init__.py", "apex/normalization/__init__.py")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python searches first, and that no other test sees again."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def install(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def problems(device: torch.device) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        require_apex(FLAGS, device)
    for flag, problem in zip(FLAGS, caught.value.problems, strict=True):
        assert problem.startswith(f"{flag} apex: ")
        assert problem.endswith(f"or use {flag} torch")
    return caught.value.problems


def test_no_apex_at_all() -> None:
    for problem in problems(CUDA):
        assert "apex is not installed: build NVIDIA's from https://github.com/NVIDIA/apex" in problem


def test_another_package_called_apex_is_named(packages: Path) -> None:
    install(packages, "apex/__init__.py", "apex/lib/__init__.py")
    for problem in problems(CUDA):
        assert f"{packages / 'apex'} is not NVIDIA's apex" in problem
        assert "Pyramid toolkit of 2013 on PyPI: pip uninstall apex" in problem


def test_nvidia_s_without_its_extensions(packages: Path) -> None:
    install(packages, *NVIDIAS)
    for problem in problems(CUDA):
        assert "lacks its CUDA extensions" in problem
        assert "APEX_CUDA_EXT=1" in problem


def test_nvidia_s_serves_cuda_devices_only(packages: Path) -> None:
    install(packages, *NVIDIAS, "amp_C.py", "fused_layer_norm_cuda.py")
    require_apex(FLAGS, CUDA)
    for problem in problems(CPU):
        assert "it runs on CUDA devices, and there are none" in problem


def test_nobody_who_does_not_ask_for_apex_needs_it() -> None:
    require_apex([], CPU)

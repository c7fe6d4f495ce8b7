"""Devices: those that this machine has, those that torch sees, and that no two ranks share one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nexus.errors import ConfigError, raise_problems

if TYPE_CHECKING:
    from megatron_nexus.parallel.host_tree import HostTree

_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def device_files() -> list[str]:
    """Return the files of this machine's accelerators; none on one of CPUs."""
    found = [*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")]
    return sorted(map(str, found))


def unseen_devices(files: Sequence[str], cuda_build: str | None, environment: Mapping[str, str]) -> str:
    """Return why torch sees none of the accelerators `files`, with the remedy; "" where it should not.

    `cuda_build` is the CUDA or ROCm version that torch was built for, None for a build for CPUs.
    """
    if not files or any(environment.get(name, "0").strip() in ("", "-1") for name in _HIDING):
        return ""
    cause = (
        f"torch was built for {cuda_build} and finds no driver for that: compare with nvidia-smi"
        if cuda_build
        else "torch is a build for CPUs: install one for this machine's driver (pytorch.org)"
    )
    return (
        f"this machine has {', '.join(files)} and torch sees no device: {cause}; "
        "to train on CPUs set CUDA_VISIBLE_DEVICES= (empty)"
    )


def require_own_device(control: "HostTree", host: str, kind: str, uuid: str) -> None:
    """Check that all ranks have one kind of device, and each its own; a collective call.

    `kind` is "cpu" or "cuda", `uuid` that of its device, "" for a CPU. Raises ConfigError on every rank.
    """
    kinds = control.distinct_str(kind)
    if len(kinds) > 1:
        listed = ", ".join(f"rank {rank} has {found}" for found, rank in kinds.items())
        raise ConfigError(f"devices differ ({listed}): start ranks on machines of one kind, see nvidia-smi")
    if kind == "cpu":
        return
    on_host = [text.split() for text in control.gather_str_on_host(f"{control.rank} {uuid}")]
    sharing = [rank for rank, other in on_host if other == uuid]
    problem = ""
    if len(sharing) > 1:
        problem = (
            f"ranks {', '.join(sharing)} on {host} share one device, {uuid}: start as many ranks on a "
            "machine as it has devices"
        )
    raise_problems(sorted(filter(None, control.distinct_str(problem))))

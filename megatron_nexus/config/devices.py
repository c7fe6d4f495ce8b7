"""Devices to plan for, from their makers' data sheets, and what `--device` says of one.

Rates are those of one device: dense products without sparsity; NVLink (or Infinity Fabric) and network in
one direction. Where several are sold under one name it is the SXM (or OAM) module. `gemm` is the share of
the peak that a product of 8192^3 in bf16 reaches: 798 TFLOP/s of an H100's 989 (measured there by others);
of the devices that are not from that generation it is a guess, as are the shares of the other rates.
"""

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_nexus.errors import raise_problems

GIB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """A device, and how it is connected to others. Units are those of `--device`."""

    name: str
    memory: float
    """GiB that a program sees."""
    bf16: float
    """TFLOP/s of matrix products, by the data sheet."""
    bandwidth: float
    """TB/s of the memory, by the data sheet."""
    fp32: float = 0.0
    """TFLOP/s without TF32; 0: a sixteenth of bf16."""
    gemm: float = 0.8
    """Share of `bf16` that large products reach."""
    processors: float = 132
    """Streaming multiprocessors (compute units): what the tiles of a product are dealt out to."""
    nvlink: float = 450
    """GB/s between devices of a node."""
    network: float = 50
    """GB/s of each device to other nodes."""
    gpus_per_node: float = 8
    torch_names: tuple[str, ...] = ()
    """What torch.cuda.get_device_name begins with."""

    @property
    def memory_bytes(self) -> int:
        """All memory that a program sees."""
        return int(self.memory * GIB)

    @property
    def usable_bytes(self) -> int:
        """Return what tensors may take: the CUDA context, NCCL's buffers and fragmentation need the rest."""
        return int(0.93 * self.memory_bytes)

    def peak_flops_per_s(self, products: str) -> float:
        """Return the data sheet's FLOP/s of dense products in "bf16", "tf32" or "fp32"."""
        match products:
            case "bf16":
                return TERA * self.bf16
            case "tf32":
                return TERA * self.bf16 / 2
            case "fp32":
                return TERA * (self.fp32 or self.bf16 / 16)
        raise AssertionError(products)

    def gemm_flops_per_s(self, products: str) -> float:
        """Return the FLOP/s that a large product reaches."""
        return self.gemm * self.peak_flops_per_s(products)


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 79.1, 989, 3.35, 67, 0.807, torch_names=("NVIDIA H100",)),
        Device("h100-pcie", 79.1, 756, 2.0, 51, 0.75, 114, 55, 25, torch_names=("NVIDIA H100 PCIe",)),
        Device("h100-nvl", 93.1, 835, 3.9, 60, 0.78, 132, 55, 25, torch_names=("NVIDIA H100 NVL",)),
        Device("h200", 139.8, 989, 4.8, 67, 0.807, torch_names=("NVIDIA H200",)),
        Device("gh200", 94.5, 989, 4.0, 67, 0.807, gpus_per_node=1, torch_names=("NVIDIA GH200",)),
        Device("b200", 178.3, 2250, 8.0, 75, 0.75, 148, 900, torch_names=("NVIDIA B200",)),
        Device("a100-80g", 79.1, 312, 2.04, 19.5, 0.85, 108, 300, 25, torch_names=("NVIDIA A100",)),
        Device(
            "a100-40g",
            *(39.4, 312, 1.56, 19.5, 0.85, 108, 300, 25),
            torch_names=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        ),
        Device("mi300x", 191.5, 1307, 5.3, 163, 0.5, 304, 448, torch_names=("AMD Instinct MI300X",)),
    )
}
_NUMBERS = [field.name for field in fields(Device) if field.type is float]


def find_device(torch_name: str) -> Device | None:
    """Return the device of a name that torch gives it; None where it is not known, or is a MIG slice."""
    named = [(name, device) for device in DEVICES.values() for name in device.torch_names]
    named.sort(key=lambda pair: -len(pair[0]))  # specific names first
    if " MIG " in torch_name:
        return None
    return next((device for name, device in named if torch_name.startswith(name)), None)


def parse_device(text: str) -> Device:
    """Return what `--device` names: `h100`, `h100,memory=93` or `memory=80,bf16=800,bandwidth=3.35`.

    Raises ConfigError, with all problems, where a name or a number is not one.
    """
    problems: list[str] = []
    name, given = "", dict[str, Any]()
    for index, word in enumerate(part.strip() for part in text.split(",")):
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals and index == 0 and key.lower() in DEVICES:
            name = key.lower()
        elif not equals:
            near = difflib.get_close_matches(key.lower(), DEVICES, n=1, cutoff=0)[0]
            problems.append(
                f"--device {key!r} is not a device that is known, {near} is the nearest: use one of "
                f"{', '.join(DEVICES)}, or say memory=GiB,bf16=TFLOP/s,bandwidth=TB/s"
            )
        elif key not in _NUMBERS:
            problems.append(f"--device {key}= is not a number of a device: use {', '.join(_NUMBERS)}")
        elif key in given:
            problems.append(f"--device gives {key} twice: keep one")
        elif (number := _number(value, *_bounds(key))) is None:
            low, high = _bounds(key)
            problems.append(f"--device {key}={value} must be a number from {low:g} to {high:g}: give one")
        else:
            given[key] = number
    needed = [key for key in ("memory", "bf16", "bandwidth") if not name and key not in given]
    if needed and not problems:
        problems.append(
            f"--device {text} lacks {', '.join(needed)}: add {','.join(f'{key}=...' for key in needed)}, or "
            f"begin with one of {', '.join(DEVICES)}"
        )
    raise_problems(problems)
    base = DEVICES[name] if name else Device(text, given["memory"], given["bf16"], given["bandwidth"])
    return replace(base, name=text if given else name, **given)


def _bounds(key: str) -> tuple[float, float]:
    """Return what a number of a device can be, generously."""
    return {"gemm": (0.01, 1.0), "gpus_per_node": (1.0, 4096.0)}.get(key, (0.001, 1e6))


def _number(text: str, low: float, high: float) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if low <= number <= high else None

"""Peak FLOP/s of the accelerators that are there, by `config.devices`.

MFU (PaLM, appendix B) is a fraction of such a number. Where none is known, as on CPUs, a run logs its
fraction of the GEMM rate that it measured at its start, and does not call it MFU.
"""

import torch

from megatron_nexus.config.devices import find_device
from megatron_nexus.parallel.mesh import Mesh


def peak_flops_per_s(mesh: Mesh, products: str) -> float | None:
    """Return the peak of all ranks' devices together, in "bf16", "tf32" or "fp32"; None: it is not known."""
    if mesh.device.type != "cuda":
        return None
    peak = device_peak(torch.cuda.get_device_name(mesh.device), products)
    return peak * mesh.world_size if peak is not None else None


def device_peak(device_name: str, products: str) -> float | None:
    """Return the peak of one device; None where it is not known, a slice of one among them."""
    device = find_device(device_name)
    return device.peak_flops_per_s(products) if device is not None else None

"""Peak FLOP/s of accelerators, from their makers' data sheets: dense matrix products, no sparsity.

MFU (PaLM, appendix B) is a fraction of such a number. Where none is known, as on CPUs, a run logs its
fraction of the GEMM rate that it measured at its start, and does not call it MFU.
"""

import torch

from megatron_nexus.config.run_config import Precision
from megatron_nexus.parallel.mesh import Mesh

TERA = 1e12
# By what torch.cuda.get_device_name begins with: bf16 tensor cores, and fp32 without TF32, which torch does
# not use by default. More specific names stand first.
_PEAKS: dict[str, dict[Precision, float]] = {
    "NVIDIA H100 PCIe": {"bf16": 756 * TERA, "fp32": 51 * TERA},
    "NVIDIA H100 NVL": {"bf16": 835 * TERA, "fp32": 60 * TERA},
    "NVIDIA H100": {"bf16": 989 * TERA, "fp32": 67 * TERA},
    "NVIDIA H200": {"bf16": 989 * TERA, "fp32": 67 * TERA},
    "NVIDIA GH200": {"bf16": 989 * TERA, "fp32": 67 * TERA},
    "NVIDIA A100": {"bf16": 312 * TERA, "fp32": 19.5 * TERA},
}


def peak_flops_per_s(mesh: Mesh, precision: Precision) -> float | None:
    """Return the peak of all ranks' devices together; None where it is not known."""
    if mesh.device.type != "cuda":
        return None
    peak = device_peak(torch.cuda.get_device_name(mesh.device), precision)
    return peak * mesh.world_size if peak is not None else None


def device_peak(device_name: str, precision: Precision) -> float | None:
    """Return the peak of one device; None where it is not known, a slice of one among them."""
    if " MIG " in device_name:
        return None
    return next((peak[precision] for name, peak in _PEAKS.items() if device_name.startswith(name)), None)

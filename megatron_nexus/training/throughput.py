"""Throughput: tokens per second as a share of what the devices can do.

MFU (PaLM, appendix B) is a share of the devices' peak FLOP/s, by `config.devices`. Where none is known, as on
CPUs, a run logs its share of the GEMM rate that it measured at its start, and does not call it MFU.
"""

import torch

from megatron_nexus.config.devices import find_device
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.metrics import utilization


def device_peak(device_name: str, products: str) -> float | None:
    """Return the peak of one device, with products in "bf16", "tf32" or "fp32"; None: it is not known."""
    device = find_device(device_name)
    return device.peak_flops_per_s(products) if device is not None else None


class Throughput:
    """The FLOP/s of a run and those of a matrix product on all ranks, and the peak where it is known."""

    def __init__(self, config: RunConfig, mesh: Mesh, flops_per_token: int, gemm_flops_per_s: float) -> None:
        self._flops_per_token, self._gemm_flops_per_s = flops_per_token, gemm_flops_per_s
        self._peak_flops_per_s = 0.0  # of all ranks together
        if mesh.device.type == "cuda":
            peak = device_peak(torch.cuda.get_device_name(mesh.device), config.training.product_precision)
            self._peak_flops_per_s = mesh.world_size * (peak or 0.0)

    def gemm_fraction(self, tokens_per_s: float) -> float:
        """Return the share of the measured matrix products."""
        return tokens_per_s * self._flops_per_token / self._gemm_flops_per_s

    def mfu(self, tokens_per_s: float) -> float | None:
        """Return the model FLOPs utilization; None where no peak of the device is known."""
        peak = self._peak_flops_per_s
        return tokens_per_s * self._flops_per_token / peak if peak else None

    def utilization(self, tokens_per_s: float) -> str:
        """Return how much of the devices a rate uses: MFU where their peak is known."""
        return utilization(self.gemm_fraction(tokens_per_s), self.mfu(tokens_per_s))

"""Throughput: tokens per second as a share of what the devices can do."""

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.metrics import utilization
from megatron_nexus.training.peak_flops import peak_flops_per_s


class Throughput:
    """The FLOP/s of a run and those of a matrix product on all ranks, and the peak where it is known."""

    def __init__(self, config: RunConfig, mesh: Mesh, flops_per_token: int, gemm_flops_per_s: float) -> None:
        self._flops_per_token, self._gemm_flops_per_s = flops_per_token, gemm_flops_per_s
        self._peak_flops_per_s = peak_flops_per_s(mesh, config.training.product_precision)

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

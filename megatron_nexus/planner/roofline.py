"""Seconds of a kernel on a device: what it computes over a rate, or what it moves over a bandwidth.

A product is cut into tiles that the processors take in waves: the last wave is not full, a tile starts
slowly, and a long k may be shared by several tiles. So small products are slower than 8192^3, whose rate the
device's record has. Constants are those of the H100 by published measurements of others; nothing here was
compared with a device yet.
"""

from functools import lru_cache
from math import ceil

from megatron_nexus.config.devices import GIGA, TERA, Device
from megatron_nexus.planner.kernels import Kernel, Kind

BANDWIDTH_SHARE = 0.82
"""Share of a memory's bandwidth that a copy reaches."""
LAUNCH_S = 2.5e-6
"""Between two kernels on the device."""
HOST_S = 5e-6
"""Host time to launch a kernel: where kernels are shorter, the device waits."""
LINK_SHARE, LINK_S = 0.8, 10e-6
"""Share of the bandwidth between a node's devices that a collective reaches, and its latency."""
NETWORK_SHARE, NETWORK_S = 0.7, 30e-6
"""The same between nodes: 35 GB/s of an H100 node's 50 fit the published grid in tests/planner."""
# Rows and columns of a tile, and the share of the processors' peak that tiles of that size reach.
TILES = (
    *((128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (192, 128, 0.97)),
    *((128, 128, 0.90), (64, 256, 0.85)),
)
TILE_START = 200  # as many steps of k as a tile takes to begin and to end
FULL_PRODUCT = 0.976  # of the tiles' peak, by this model, at 8192^3
# Of the rate of large products, forward and backward: FlashAttention-3's paper, cuDNN on an H100.
ATTENTION_SHARES = {False: (0.50, 0.40), True: (0.70, 0.55)}
WIDE_HEAD = 80  # larger ones reach the second pair
BACKWARD_REPEATS = 1.25  # backward computes the scores again: 2.5 times forward, not 2


class Roofline:
    """The rates of a device with `products` in "bf16", "tf32" or "fp32"."""

    def __init__(self, device: Device, products: str) -> None:
        self.device = device
        self.gemm_rate = device.gemm_flops_per_s(products)
        self.element_bytes = 2 if products == "bf16" else 4
        self.bandwidth = BANDWIDTH_SHARE * TERA * device.bandwidth
        self.seconds = lru_cache(maxsize=4096)(self._seconds)

    def _seconds(self, kernel: Kernel, ranks: int = 1) -> float:
        """Return the seconds of a kernel; of a collective, among as many neighbouring `ranks`."""
        match kernel.kind:
            case Kind.COLLECTIVE:
                return self.link_seconds(kernel.moved, kernel.count, ranks, ranks)
            case Kind.POINTWISE:
                return kernel.moved / self.bandwidth + kernel.count * LAUNCH_S
            case Kind.GEMM:
                return kernel.count * self._product(*kernel.shape)
            case Kind.ATTENTION:
                size, backward, causal = kernel.shape
                share = ATTENTION_SHARES[size > WIDE_HEAD][int(backward)]
                flops = kernel.flops * (BACKWARD_REPEATS if backward else 1.0) / (2.0 if causal else 1.0)
                computed = flops / (share * self.gemm_rate)
                return max(computed, kernel.moved / self.bandwidth) + kernel.count * LAUNCH_S

    def _product(self, batch: float, m: float, n: float, k: float) -> float:
        processors = self.device.processors
        rate = self.gemm_rate / FULL_PRODUCT / processors
        best = float("inf")
        for rows, columns, share in TILES:
            for parts in (1, 2, 4, 8):
                if parts > 1 and k / parts < 1024:
                    continue
                tiles = parts * batch * ceil(m / rows) * ceil(n / columns)
                waves = ceil(tiles / processors)
                tile_s = 2 * rows * columns * (k / parts + TILE_START) / (rate * share)
                # Half of what the last wave leaves idle is not lost: the others run faster.
                idle = 0.5 * (waves - tiles / processors) if waves > 1 else 0.0
                sums_s = 2 * 4 * parts * m * n * batch / self.bandwidth + LAUNCH_S if parts > 1 else 0.0
                best = min(best, (waves - idle) * tile_s + sums_s)
        moved = self.element_bytes * batch * (m * k + k * n + m * n)
        return max(best, moved / self.bandwidth) + LAUNCH_S

    def link_seconds(self, sent: float, messages: float, ranks: int, spanned: int) -> float:
        """Return the seconds in which each of `ranks` sends bytes to its neighbour in a ring, in so many
        messages; a ring that lies among `spanned` neighbouring ranks may leave the node.
        """
        if ranks == 1:
            return 0.0
        if spanned <= self.device.gpus_per_node:
            return sent / (LINK_SHARE * GIGA * self.device.nvlink) + messages * LINK_S
        # Each device has its own way out, and no ring is faster than its links within the node.
        rate = min(NETWORK_SHARE * self.device.network, LINK_SHARE * self.device.nvlink)
        return sent / (GIGA * rate) + messages * NETWORK_S * ranks.bit_length()


@lru_cache(maxsize=64)
def roofline_of(device: Device, products: str) -> Roofline:
    """Return the rates of a device, whose kernels it remembers."""
    return Roofline(device, products)

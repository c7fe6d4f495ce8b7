"""Kernels: what each operation of a traced pass asks of a device, and what torch.compile fuses of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_nexus.spec.cost import attention_flops_per_token


class Kind(StrEnum):
    """What bounds a kernel."""

    GEMM = "matrix products"
    ATTENTION = "attention"
    POINTWISE = "pointwise, norms, copies"
    COLLECTIVE = "tensor-parallel communication"


@dataclass(frozen=True)
class Kernel:
    """Kernels that are alike. FLOPs are those of the model-FLOPs convention (`spec.cost`)."""

    kind: Kind
    flops: float = 0.0
    """FLOPs of all of them."""
    moved: float = 0.0
    """Bytes that all of them read and write; of collectives, bytes that a rank sends."""
    shape: tuple[float, ...] = ()
    """A product's batch, m, n, k; an attention's head size, 1 if backward, 1 if causal."""
    count: float = 1.0

    def between(self, other: "Kernel", share: float) -> "Kernel":
        """Return the kernel that is `share` of the way to `other`, the same one of a larger micro-batch."""
        assert self.kind is other.kind, f"{self} is not {other}"
        return Kernel(
            self.kind,
            self.flops + share * (other.flops - self.flops),
            self.moved + share * (other.moved - self.moved),
            tuple(a + share * (b - a) for a, b in zip(self.shape, other.shape, strict=True)),
            self.count + share * (other.count - self.count),
        )


def merged(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Return the same kernels, all that have no shape as one of their kind."""
    products: list[Kernel] = []
    others: dict[Kind, Kernel] = {}
    for kernel in kernels:
        if kernel.shape:
            products.append(kernel)
        else:
            one = others.get(kernel.kind, Kernel(kernel.kind, count=0.0))
            moved, count = one.moved + kernel.moved, one.count + kernel.count
            others[kernel.kind] = Kernel(kernel.kind, moved=moved, count=count)
    return (*products, *others.values())


@dataclass(frozen=True)
class Operation:
    """A kernel with the storages that it reads and writes, by number, and the bytes of each."""

    kernel: Kernel
    reads: Mapping[int, int] = field(default_factory=dict)
    writes: Mapping[int, int] = field(default_factory=dict)


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
NO_KERNEL = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
# They touch the rows that they are given, not the table.
ROWS = ("embedding", "gather", "index", "scatter_add_", "index_select")


def tensor_bytes(x: Tensor) -> int:
    """Return the bytes of what a tensor shows, of an expanded one those that exist."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def kernel_of(name: str, inputs: object, outputs: object) -> Kernel:
    """Return the kernel of the operation `name` of aten, which is no view."""
    read = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    written = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    if name in ROWS:
        touched = [x for x in (*read[1:], *written) if x.dtype.is_floating_point]
        small = min((tensor_bytes(x) for x in touched), default=0)
        return Kernel(Kind.POINTWISE, moved=3 * small)
    moved = sum(tensor_bytes(x) for x in (*read, *written))
    if name in PRODUCTS:
        a, b = read[-2:]
        batch = a.shape[0] if a.dim() == 3 else 1
        shape = (batch, a.shape[-2], b.shape[-1], a.shape[-1])
        return Kernel(Kind.GEMM, 2.0 * batch * shape[1] * shape[2] * shape[3], moved, shape)
    if "scaled_dot_product" in name:
        backward = "backward" in name
        q, k = read[backward : backward + 2]
        return attention_kernel(q, k, causal=True, backward=backward)
    return Kernel(Kind.POINTWISE, moved=moved)


def attention_kernel(q_BNTH: Tensor, k: Tensor, causal: bool, backward: bool) -> Kernel:
    """Return the fused attention of queries and keys [B, N, T, H]."""
    batch, heads, tokens, size = q_BNTH.shape
    flops = batch * tokens * attention_flops_per_token(heads * size, k.shape[2])
    moved = (2 + 2 * backward) * (tensor_bytes(q_BNTH) + tensor_bytes(k))
    return Kernel(Kind.ATTENTION, flops * (1 + backward), moved, (size, backward, causal))


class Fusion:
    """Kernels of compiled blocks: pointwise operations between products are one kernel.

    It reads what exists in memory and writes what a product, an attention, a collective or another layer
    reads. What such a kernel alone reads again, in backward too, is computed again from its sources, as
    inductor and its partitioner of forward and backward do. Of a graph's layers in the order run.
    """

    def __init__(self) -> None:
        self.sources: dict[int, dict[int, int]] = {}
        """For each storage that is never written, the storages it was computed from, and their bytes."""

    def kernels(self, operations: Sequence[Operation]) -> list[Kernel]:
        """Return the kernels of one layer's operations."""
        needed = {
            storage for one in operations if one.kernel.kind is not Kind.POINTWISE for storage in one.reads
        }
        if operations:
            needed |= operations[-1].writes.keys()
        kernels: list[Kernel] = []
        read: dict[int, int] = {}
        written: dict[int, int] = {}
        for one in operations:
            if one.kernel.kind is not Kind.POINTWISE:
                kernels += [*_pointwise(read, written), one.kernel]
                read, written = {}, {}
                for storage in one.writes:
                    self.sources.pop(storage, None)
                continue
            sources: dict[int, int] = {}
            for storage, size in one.reads.items():
                if storage not in written:
                    sources |= self.sources.get(storage, {storage: size})
            read |= sources
            for storage, size in one.writes.items():
                if storage in needed:
                    written[storage] = size
                    self.sources.pop(storage, None)
                else:
                    self.sources[storage] = sources
        return [*kernels, *_pointwise(read, written)]


def _pointwise(read: Mapping[int, int], written: Mapping[int, int]) -> Iterable[Kernel]:
    if written:
        moved = sum(read.values()) + sum(written.values())
        yield Kernel(Kind.POINTWISE, moved=moved)

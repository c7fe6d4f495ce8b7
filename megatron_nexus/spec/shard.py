"""Shard: which part of each logical tensor a tensor-parallel rank holds, and the padding around it.

The only place that divides by the tensor-parallel size. Padding is exactly zero and stays so under
training, because a unit whose incoming and outgoing weights are zero gets zero gradients: GELU(0) = 0,
and SwiGLU of zeros is 0.
"""

from dataclasses import dataclass
from math import prod

from megatron_nexus.spec.param import Axis, Layout, ParamSpec


@dataclass(frozen=True)
class Box:
    """A rectangular part of a logical tensor: its first index and its size along each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return prod(self.sizes)

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of the box in its tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    @property
    def index_at_origin(self) -> tuple[slice, ...]:
        """The index of the box in a tensor whose origin it lies at."""
        return tuple(slice(0, size) for size in self.sizes)


@dataclass(frozen=True)
class Shard:
    """One tensor-parallel rank's view of the logical tensors.

    `multiple` is the alignment in elements of each rank's part of a SHARDED_PADDED axis.
    """

    rank: int
    size: int
    multiple: int = 1

    def part(self, axis: Axis) -> int:
        """Elements that each rank stores of a split axis, padding included."""
        if axis.layout is Layout.SHARDED:
            assert axis.size % self.size == 0, f"{axis} does not divide by {self.size}"
            return axis.size // self.size
        unit = self.multiple * self.size
        return -(-axis.size // unit) * self.multiple

    def stored(self, axis: Axis) -> int:
        """Elements of `axis` in this rank's memory, padding included."""
        match axis.layout:
            case Layout.REPLICATED:
                return axis.size
            case Layout.GATHERED:
                return self.part(axis) * self.size
            case Layout.SHARDED_PADDED | Layout.SHARDED:
                return self.part(axis)

    def logical_range(self, axis: Axis) -> tuple[int, int]:
        """The logical indices [start, stop) that this rank holds; empty where it holds padding only."""
        if axis.layout in (Layout.REPLICATED, Layout.GATHERED):
            return 0, axis.size
        part = self.part(axis)
        return min(self.rank * part, axis.size), min((self.rank + 1) * part, axis.size)

    def local_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Shape of the tensor in this rank's memory."""
        return tuple(self.stored(axis) for axis in spec.axes)

    def box(self, spec: ParamSpec) -> Box:
        """Return the part of the logical tensor that this rank holds, at the origin of its local tensor."""
        ranges = [self.logical_range(axis) for axis in spec.axes]
        return Box(tuple(start for start, _ in ranges), tuple(stop - start for start, stop in ranges))

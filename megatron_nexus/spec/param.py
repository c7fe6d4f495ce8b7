"""ParamSpec: the one description of a parameter that everything else reads.

A parameter is a logical tensor with named axes. How it lies on ranks (`shard`), what it starts as
(`initialise`), what it costs (`cost`), and how a checkpoint keeps it all follow from its spec.
"""

from dataclasses import dataclass
from enum import StrEnum


class Layout(StrEnum):
    """How an axis lies on the tensor-parallel ranks."""

    WHOLE = "whole"  # all of it on every rank
    SPLIT = "split"  # padded with zeros to equal parts, one for each rank
    GATHERED = "gathered"  # all of it on every rank, padded as the SPLIT axis whose activations it reads
    EXACT = "exact"  # equal parts without padding; the rules ensure that it divides (attention heads)


class Role(StrEnum):
    """What a parameter does, hence what it costs and whether weight decay applies."""

    MATMUL = "matmul"  # 2 FLOPs per element and token, forward
    LOOKUP = "lookup"  # read by row: no FLOPs
    VECTOR = "vector"  # pointwise gain: no weight decay, no FLOPs worth counting


@dataclass(frozen=True)
class Axis:
    """A logical axis: what it enumerates, its global size, its layout."""

    name: str
    size: int
    layout: Layout = Layout.WHOLE


@dataclass(frozen=True)
class Normal:
    """Initial values drawn from N(0, std^2)."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Initial values all equal."""

    value: float


@dataclass(frozen=True)
class ParamSpec:
    """A logical parameter: its name, its axes in stored order, its initial values, its role."""

    name: str
    axes: tuple[Axis, ...]
    init: Normal | Constant
    role: Role

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, as a checkpoint holds it."""
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> int:
        """Elements of the logical tensor."""
        count = 1
        for axis in self.axes:
            count *= axis.size
        return count

    @property
    def is_sharded(self) -> bool:
        """Whether tensor-parallel ranks hold different parts of it."""
        return any(axis.layout in (Layout.SPLIT, Layout.EXACT) for axis in self.axes)

    @property
    def decays(self) -> bool:
        """Whether AdamW's weight decay applies."""
        return self.role is not Role.VECTOR

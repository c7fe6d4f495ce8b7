"""ParamSpec: the one description of a parameter that everything else reads.

A parameter is a logical tensor with named axes. How it lies on ranks (`shard`), what it starts as
(`initialise`), what it costs (`cost`), how it grows (`growth_rule`) and how a checkpoint keeps it all follow
from its spec.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod


class Layout(StrEnum):
    """How an axis lies on the tensor-parallel ranks."""

    REPLICATED = "whole"  # all of it on every rank
    SHARDED_PADDED = "split"  # padded with zeros to equal parts, one for each rank
    GATHERED = (
        "gathered"  # all of it on every rank, padded as the SHARDED_PADDED axis whose activations it reads
    )
    SHARDED = "exact"  # equal parts without padding; the rules ensure that it divides (attention heads)


class Role(StrEnum):
    """What a parameter does, hence what it costs and whether weight decay applies."""

    MATMUL = "matmul"  # 2 FLOPs per element and token, forward
    LOOKUP = "lookup"  # read by row: no FLOPs
    VECTOR = "vector"  # pointwise gain: no weight decay, no FLOPs worth counting


class Flow(StrEnum):
    """What a parameter does with the units of one of its axes.

    Growth adds units to an axis and puts one zero on every path that leads through them back to old
    units: into the parameters that write them, or into those that read them (`growth_rule`).
    """

    WRITES = "writes"  # the units are its products
    READS = "reads"  # the units are what it multiplies
    GATES = "gates"  # its products multiply what another parameter writes: SwiGLU's gate, keys, gains
    SCORES = "scores"  # as GATES by head, but the products of a head's channels are summed: queries
    BOUNDARY = "ends"  # the units are the model's inputs or outputs: no path leads back from them


@dataclass(frozen=True)
class Axis:
    """A logical axis: what it enumerates, its global size, its layout.

    `group` is the number of neighbours that belong together: an axis of heads x channels has groups of one
    head's channels; either number may grow. `residual` marks the residual stream, which is read through a
    norm: its new units must be zero at first, for the norm sees them all.
    """

    name: str
    size: int
    layout: Layout = Layout.REPLICATED
    group: int = 1
    residual: bool = False


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
    """A logical parameter: its name, its axes in stored order, its initial values, its role.

    `growth_roles` says for each axis what the parameter does with its units; a matrix is stored [out, in].
    """

    name: str
    axes: tuple[Axis, ...]
    init: Normal | Constant
    role: Role
    growth_roles: tuple[Flow, ...] = (Flow.WRITES, Flow.READS)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, as a checkpoint holds it."""
        return tuple(axis.size for axis in self.axes)

    @property
    def numel(self) -> int:
        """Elements of the logical tensor."""
        return prod(self.shape)

    @property
    def is_sharded(self) -> bool:
        """Whether tensor-parallel ranks hold different parts of it."""
        return any(axis.layout in (Layout.SHARDED_PADDED, Layout.SHARDED) for axis in self.axes)

    @property
    def decays(self) -> bool:
        """Whether AdamW's weight decay applies."""
        return self.role is not Role.VECTOR

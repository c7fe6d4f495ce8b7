"""TensorParallel: the collectives between the ranks that share each layer, forward and backward.

A layer reads as single-device maths with four calls: `enter` before column-parallel weights, `leave` after
row-parallel ones, `gather_features` and `scatter_features` between them. Each takes several tensors at once
and moves them in one collective. With one rank every call returns its arguments.

T tokens, B batch, t ranks, f = (t - 1) / t. Activations are [T, B, ...]; under sequence parallelism those
outside `enter` ... `leave` are this rank's T / t tokens. Bytes moved are per rank, for a ring.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

Group = dist.ProcessGroup

# torch 2.13 has renamed them; both names move flat tensors.
_all_gather_into: Callable[..., object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_into: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _all_gather(x: Tensor, group: Group) -> Tensor:
    """[*] -> [t, *]."""
    gathered = x.new_empty(group.size() * x.numel())
    _all_gather_into(gathered, x.contiguous().view(-1), group=group)
    return gathered.view(group.size(), *x.shape)


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[t, *] -> [*], the sum over ranks of this rank's slice."""
    mine = x.new_empty(x.numel() // group.size())
    reduce_scatter_into(mine, x.contiguous().view(-1), group=group)
    return mine.view(x.shape[1:])


def _gather_last(xs: Sequence[Tensor], group: Group) -> tuple[Tensor, ...]:
    """Each [..., w] -> [..., t w], all in one all-gather."""
    flat = torch.cat([x.reshape(-1) for x in xs])
    gathered = _all_gather(flat, group)
    parts = gathered.split([x.numel() for x in xs], dim=1)
    return tuple(
        part.view(group.size(), *x.shape).movedim(0, -2).reshape(*x.shape[:-1], -1)
        for part, x in zip(parts, xs, strict=True)
    )


def _scatter_last(ys: Sequence[Tensor], group: Group) -> tuple[Tensor, ...]:
    """Each partial sum [..., t w] -> the sum [..., w] of this rank's columns, all in one reduce-scatter."""
    size = group.size()
    shapes = [(*y.shape[:-1], y.shape[-1] // size) for y in ys]
    by_rank = [
        y.view(*shape[:-1], size, shape[-1]).movedim(-2, 0).reshape(size, -1)
        for y, shape in zip(ys, shapes, strict=True)
    ]
    mine = _reduce_scatter(torch.cat(by_rank, dim=1), group)
    parts = mine.split([part.shape[1] for part in by_rank])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


class _Collective(FunctionCtx):
    """What the functions below keep for their backward."""

    group: Group


class _Copy(Function):
    """Forward: identity. Backward: all-reduce, 2 f |x| elements."""

    @staticmethod
    def forward(ctx: _Collective, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _Collective, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Sum(Function):
    """Forward: all-reduce, 2 f |x| elements. Backward: identity."""

    @staticmethod
    def forward(ctx: _Collective, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: _Collective, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllReduceStat(_Copy):
    """Forward: all-reduce of a value that every rank then uses in its own way. Backward: all-reduce."""

    @staticmethod
    def forward(ctx: _Collective, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)


class _GatherTokens(Function):
    """Forward: all-gather of the first axis, f |x| t elements. Backward: reduce-scatter, the same."""

    @staticmethod
    def forward(ctx: _Collective, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: _Collective, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad.unflatten(0, (ctx.group.size(), -1)), ctx.group), None


class _GatherTokensOfWhole(_GatherTokens):
    """Forward: all-gather of the first axis. Backward: this rank's part of a gradient that all ranks have."""

    @staticmethod
    def backward(ctx: _Collective, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


class _ScatterTokens(Function):
    """Forward: reduce-scatter of partial sums over the first axis, f |x| elements. Backward: all-gather."""

    @staticmethod
    def forward(ctx: _Collective, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x.unflatten(0, (group.size(), -1)), group)

    @staticmethod
    def backward(ctx: _Collective, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group).flatten(0, 1), None


class _GatherFeatures(Function):
    """Forward: all-gather of the last axis of all tensors, fused. Backward: reduce-scatter, fused."""

    @staticmethod
    def forward(ctx: _Collective, group: Group, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return _gather_last(xs, group)

    @staticmethod
    def backward(ctx: _Collective, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_scatter_last(grads, ctx.group))


class _ScatterFeatures(Function):
    """Forward: reduce-scatter of partial sums over the last axis, fused. Backward: all-gather, fused."""

    @staticmethod
    def forward(ctx: _Collective, group: Group, *ys: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return _scatter_last(ys, group)

    @staticmethod
    def backward(ctx: _Collective, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_gather_last(grads, ctx.group))


class TensorParallel:
    """The ranks that share each layer, and whether they share the tokens between layers as well."""

    def __init__(self, group: Group | None, sequence_parallel: bool = False) -> None:
        """`group` None stands for one rank without a process group."""
        self.size = group.size() if group is not None else 1
        self.rank = group.rank() if group is not None else 0
        self.sequence_parallel = sequence_parallel and self.size > 1
        self._group = group if self.size > 1 else None

    def _apply(self, function: type[Function], x: Tensor) -> Tensor:
        return x if self._group is None else function.apply(x, self._group)

    def tokens(self, x_TBD: Tensor) -> int:
        """Return the tokens of a sample, of which `x_TBD` between layers holds all or this rank's part."""
        return x_TBD.shape[0] * (self.size if self.sequence_parallel else 1)

    def enter(self, x: Tensor) -> Tensor:
        """Return all tokens on every rank, for column-parallel weights; backward sums the gradient.

        Megatron's copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region under SP.
        """
        return self._apply(_GatherTokens if self.sequence_parallel else _Copy, x)

    def enter_summed(self, x: Tensor) -> Tensor:
        """`enter` for what sums the gradient over ranks itself."""
        return self._apply(_GatherTokensOfWhole, x) if self.sequence_parallel else x

    def leave(self, partial: Tensor) -> Tensor:
        """Sum the partial products of row-parallel weights over ranks.

        Megatron's reduce_from_tensor_model_parallel_region; under SP
        reduce_scatter_to_sequence_parallel_region, which keeps this rank's tokens.
        """
        return self._apply(_ScatterTokens if self.sequence_parallel else _Sum, partial)

    def gather_features(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """Column parts [..., w] of each tensor to all columns [..., t w], in one collective."""
        return xs if self._group is None else _GatherFeatures.apply(self._group, *xs)

    def gather_grouped_features(self, x_TBGw: Tensor) -> Tensor:
        """Column parts of G tensors, [T, B, G, w], to all columns, [G, T, B, t w], in one collective."""
        (gathered,) = self.gather_features(x_TBGw.flatten(-2))
        by_rank = gathered.unflatten(-1, (self.size, *x_TBGw.shape[-2:]))  # [T, B, t, G, w]
        return by_rank.movedim(-2, 0).flatten(-2)

    def scatter_features(self, *partials: Tensor) -> tuple[Tensor, ...]:
        """Partial sums [..., t w] of each tensor to this rank's columns [..., w], in one collective."""
        return partials if self._group is None else _ScatterFeatures.apply(self._group, *partials)

    def all_reduce_stat(self, x: Tensor) -> Tensor:
        """All-reduce a statistic that each rank uses on its own columns; its gradient is all-reduced too."""
        return self._apply(_AllReduceStat, x)

    def sum_grad_under_sp(self, weight: Tensor) -> Tensor:
        """Return a replicated weight whose gradient is all-reduced under sequence parallelism.

        For one that is applied to this rank's tokens: all tokens, the same on every rank, without it.
        """
        return self.sum_grad(weight) if self.sequence_parallel else weight

    def sum_grad(self, weight: Tensor) -> Tensor:
        """Return a replicated weight that ranks apply to their own columns: its gradient is all-reduced."""
        return self._apply(_Copy, weight)

    def maximum(self, x: Tensor) -> Tensor:
        """Return elementwise maximum over ranks; no gradient."""
        if self._group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._group)
        return x

    def all_gather_stat(self, x: Tensor) -> Tensor:
        """Return the values of every rank, [*] -> [t, *]; no gradient."""
        return x[None] if self._group is None else _all_gather(x, self._group)

    def sum(self, x: Tensor) -> Tensor:
        """Return elementwise sum over ranks, in place; no gradient."""
        if self._group is not None:
            dist.all_reduce(x, group=self._group)
        return x

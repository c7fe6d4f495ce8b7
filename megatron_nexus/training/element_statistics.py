"""Squares of gradients, weights and updates, of the old and of the new elements on this rank.

They are read around Adam's step from the buffers of its own shard: no rank sees more, nothing is sent. In
that step alone a copy of the rank's fp32 weights exists (4 bytes an element), when no activations are held.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from megatron_nexus.checkpoint.chunks import index_within, intersect
from megatron_nexus.training.grown_elements import GrownElements
from megatron_nexus.training.zero_state import ZeroState, memory_address


class Square(IntEnum):
    """The columns of the sums."""

    COUNT = 0
    GRADIENT = 1
    WEIGHT = 2
    UPDATE = 3


@dataclass(frozen=True)
class _Part:
    """A view of fp32 weights in a buffer of the optimizer, and the row of its sums: tensor, old or new."""

    row: tuple[int, int]
    weights: Tensor

    def within(self, buffer: Tensor, other: Tensor) -> Tensor:
        """Return the same elements of `other`, which is laid out as `buffer`, of which this is a view."""
        offset = self.weights.storage_offset() - buffer.storage_offset() + other.storage_offset()
        return other.as_strided(self.weights.size(), self.weights.stride(), offset)


class ElementStatistics:
    """Sums over this rank's elements, taken in the steps for which `enabled` is set."""

    def __init__(
        self,
        state: ZeroState,
        elements: Mapping[str, GrownElements],
        counts_whole: bool,
        device: torch.device,
    ) -> None:
        """`counts_whole`: whether this tensor-parallel rank counts the tensors that all of them hold."""
        self.enabled = False
        #: [tensors, 2, 4]: of each tensor the old and the new elements, by `Square`.
        self.sums = torch.zeros(len(elements), 2, len(Square), dtype=torch.float64, device=device)
        self._parts: dict[int, list[_Part]] = {}
        self._before: dict[int, Tensor] = {}
        numbers = {name: number for number, name in enumerate(elements)}
        for view in state.views():
            name = view.spec.name
            if not (view.spec.is_sharded or counts_whole):
                continue
            for box, is_new in elements[name].boxes:
                if overlap := intersect(box, view.box):
                    weights = view.values["fp32"][index_within(overlap, view.box)]
                    self._parts.setdefault(memory_address(weights), []).append(
                        _Part((numbers[name], int(is_new)), weights)
                    )
        state.around_each_step(self._before_step, self._after_step)

    @torch.no_grad()
    def _before_step(self, adam: torch.optim.Optimizer, *_: object) -> None:
        if not self.enabled:
            return
        for flat, parts in self._of(adam):
            weights, gradient = flat.detach(), flat.grad
            assert gradient is not None, "Adam is about to use it"
            self._before[memory_address(flat)] = weights.clone()
            for part in parts:
                sums = self.sums[part.row]
                sums[Square.COUNT] += part.weights.numel()
                sums[Square.GRADIENT] += square_sum(part.within(weights, gradient))
                sums[Square.WEIGHT] += square_sum(part.weights)

    @torch.no_grad()
    def _after_step(self, adam: torch.optim.Optimizer, *_: object) -> None:
        if not self.enabled:
            return
        for flat, parts in self._of(adam):
            weights = flat.detach()
            update = self._before.pop(memory_address(flat)).sub_(weights)
            for part in parts:
                self.sums[part.row][Square.UPDATE] += square_sum(part.within(weights, update))

    def _of(self, adam: torch.optim.Optimizer) -> list[tuple[Tensor, list[_Part]]]:
        """Return the buffers of this step, of which an engine may take several, with their parts."""
        buffers = [flat for group in adam.param_groups for flat in group["params"]]
        return [(flat, parts) for flat in buffers if (parts := self._parts.get(memory_address(flat)))]


def square_sum(values: Tensor) -> Tensor:
    """Return the sum of squares of all elements, in float64."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()

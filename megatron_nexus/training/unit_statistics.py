"""Squares of the units before and after their activation, and how many are dead, from a pass forward.

Each tensor-parallel rank sees its own units of M, A and the feed-forward, data-parallel ranks other tokens.
"""

from collections.abc import Mapping
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.grown_elements import GrownElements
from megatron_nexus.training.zero_state import Parameters

DEAD_BELOW = 1e-6
"""A unit is dead whose activation is no larger for any token: GELU below -5.2, or of less than 2e-6."""


class Unit(IntEnum):
    """The columns of the sums over units; squares are means over the tokens."""

    COUNT = 0
    BEFORE = 1
    AFTER = 2
    DEAD = 3


class UnitStatistics:
    """Called with the activations of one pass over the same tokens by all data-parallel ranks."""

    def __init__(self, parameters: Parameters) -> None:
        self._names = {id(parameter): name for name, (_, parameter) in parameters.items()}
        self._seen: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, reader: Tensor, before: Tensor, after: Tensor) -> None:
        """Add the units, [tokens.., units], that the matrix `reader` reads."""
        name = self._names[id(reader)]
        before, after = before.flatten(0, -2), after.flatten(0, -2)
        norms = [torch.linalg.vector_norm(x, dim=0, dtype=torch.float32) for x in (before, after)]
        alive = after.abs().amax(dim=0) > DEAD_BELOW
        now = torch.stack([norms[0].double().square(), norms[1].double().square(), alive.double()])
        held = self._seen.get(name)
        self._seen[name] = now if held is None else held + now
        self._tokens[name] = self._tokens.get(name, 0) + len(before)

    def sums(self, elements: Mapping[str, GrownElements], mesh: Mesh) -> Tensor:
        """Return [tensors, 2, 4]: old and new units of this rank by `Unit`; a collective call along dp."""
        sums = torch.zeros(len(elements), 2, len(Unit), dtype=torch.float64, device=mesh.device)
        if self._seen:
            together = torch.cat([held.flatten() for held in self._seen.values()])
            dist.all_reduce(together, group=mesh.dp_group)
            parts = together.split([held.numel() for held in self._seen.values()])
            self._seen = {n: p.view(3, -1) for n, p in zip(self._seen, parts, strict=True)}
        if mesh.dp_rank != 0:
            return sums
        numbers = {name: number for number, name in enumerate(elements)}
        for name, seen in self._seen.items():
            new = elements[name].new_units(1)
            first = mesh.tp_rank * seen.shape[1]
            new = new[first : first + seen.shape[1]].to(mesh.device)  # without the padding
            tokens = self._tokens[name] * mesh.dp_size
            for is_new in (False, True):
                of_kind = seen[:, : len(new)][:, new == is_new]
                row = sums[numbers[name], int(is_new)]
                row[Unit.COUNT] = of_kind.shape[1]
                row[Unit.BEFORE], row[Unit.AFTER] = of_kind[:2].sum(dim=1) / tokens
                row[Unit.DEAD] = (of_kind[2] == 0.0).sum()
        return sums

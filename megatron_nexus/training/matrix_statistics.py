"""Numbers of a whole matrix [out, in]: its ranks, and how alike its new units are to old ones.

    stable rank       ||W||_F^2 / ||W||_2^2
    effective rank    exp(-sum_i p_i log p_i), p = s / sum s, s the singular values (Roy and Vetterli, 2007)
    likeness          of a new row, or column, the largest |cosine| with an old one; its mean and its maximum
    source            of a row that began as a copy, the cosine with the row it is a copy of; mean, minimum

The singular values are the roots of the eigenvalues of the smaller Gram matrix, in float64. A rank that
holds a part of a matrix puts it into zeros; the sum over data- and tensor-parallel ranks, on one of them in
turn, is the matrix, bit for bit as it lies in the optimizer. Decompositions of large matrices take longer
than all else together, and what they tell changes slowly: hence `RANKS_EVERY`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.grown_elements import GrownElements
from megatron_nexus.training.zero_state import ZeroState

MATRIX_NUMBERS = (
    "stable_rank",
    "stable_rank_old",
    "stable_rank_new",
    "effective_rank",
    "effective_rank_old",
    "effective_rank_new",
    "row_cosine_max",
    "row_cosine_mean",
    "column_cosine_max",
    "column_cosine_mean",
)
"""`old`: old rows and old columns. `new`: new rows, or new columns where no row is new."""
SOURCE_NUMBERS = ("source_cosine_mean", "source_cosine_min")
RANKS_EVERY = 10
"""Measurements, of which the first has the ranks of every matrix, the others of small ones alone."""
RANKS_SIDE = 256
"""The smaller side of a small matrix, at most: a decomposition takes 10 ms."""
Held: TypeAlias = Mapping[str, Sequence[tuple[tuple[slice, ...], Tensor]]]
"""Of each matrix, the parts on this rank and where they are in it."""


def stable_and_effective_rank(matrix: Tensor) -> tuple[float, float]:
    """Return both ranks of a matrix; NaN where it has no elements, or is zero."""
    if not matrix.numel():
        return torch.nan, torch.nan
    wide = matrix.double()
    gram = wide @ wide.t() if len(wide) <= wide.shape[1] else wide.t() @ wide
    squares = torch.linalg.eigvalsh(gram).clamp_min(0.0)
    if float(squares[-1]) == 0.0:
        return torch.nan, torch.nan
    shares = squares.sqrt() / squares.sqrt().sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return float(squares.sum() / squares[-1]), float(entropy.exp())


def largest_cosines(rows: Tensor, new: Tensor) -> Tensor:
    """Return the largest |cosine| of each row that is `new` and not zero with one that is not new."""
    if not new.any():
        return rows.new_empty(0)
    unit = torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-300)
    is_zero = unit.square().sum(dim=1) == 0.0
    ones, others = unit[new & ~is_zero].float(), unit[~new & ~is_zero].float()
    if not len(ones) or not len(others):
        return ones.new_empty(0)
    return (ones @ others.t()).abs().amax(dim=1)


def matrix_numbers(matrix: Tensor, new_rows: Tensor, new_columns: Tensor, with_ranks: bool) -> list[float]:
    """Return the numbers of MATRIX_NUMBERS; NaN where there is nothing to measure, or no rank is due."""
    ranks = [(torch.nan, torch.nan)] * 3
    if with_ranks or min(matrix.shape) <= RANKS_SIDE:
        new = matrix[new_rows] if new_rows.any() else matrix[:, new_columns]
        ranks[0] = ranks[1] = stable_and_effective_rank(matrix)
        if new_rows.any() or new_columns.any():
            ranks[1:] = map(stable_and_effective_rank, (matrix[~new_rows][:, ~new_columns], new))
    numbers = [*(stable for stable, _ in ranks), *(effective for _, effective in ranks)]
    for side, mask in ((matrix, new_rows), (matrix.t(), new_columns)):
        cosines = largest_cosines(side, mask)
        numbers += [float(cosines.max()), float(cosines.mean())] if len(cosines) else [torch.nan, torch.nan]
    return numbers


def source_numbers(matrix: Tensor, source: Tensor, copies: Sequence[tuple[int, int, int]]) -> list[float]:
    """Return the numbers of SOURCE_NUMBERS of a matrix whose rows `copies` began as rows of `source`."""
    rows = [(matrix[to : to + n], source[first : first + n]) for to, n, first in copies]
    ones, others = (torch.cat(side).double() for side in zip(*rows, strict=True))
    norms = torch.linalg.vector_norm(ones, dim=1) * torch.linalg.vector_norm(others, dim=1)
    cosines = ((ones * others).sum(dim=1) / norms)[norms > 0.0]
    return [float(cosines.mean()), float(cosines.min())] if len(cosines) else [torch.nan, torch.nan]


def own_matrices(
    state: ZeroState, elements: Mapping[str, GrownElements], mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Yield each matrix of this pipeline stage on one rank of it, in turn; a collective call of its ranks."""
    held = _held(state, mesh)
    for number, name in enumerate(_matrices(state)):
        if (matrix := _put_together(held, elements[name], number, mesh)) is not None:
            yield name, matrix


def copied_matrices(
    state: ZeroState, elements: Mapping[str, GrownElements], stages: Mapping[str, int], mesh: Mesh
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each matrix with copied rows and the one with their sources on one rank; a collective call.

    `stages`: the pipeline stage of each tensor. A source of another stage is sent to that of the copy.
    """
    held, mine = _held(state, mesh), set(_matrices(state))
    copied = [(name, of.source) for name, of in elements.items() if of.source]
    for number, (name, source) in enumerate(copied):
        copy, original = (
            _put_together(held, elements[one], number, mesh) if one in mine else None
            for one in (name, source)
        )
        if stages[name] != stages[source]:
            if original is not None:
                dist.send(original, dist.get_global_rank(mesh.pp_group, stages[name]), group=mesh.pp_group)
            if copy is not None:
                original = torch.empty(elements[source].spec.shape, device=mesh.device)
                dist.recv(original, dist.get_global_rank(mesh.pp_group, stages[source]), group=mesh.pp_group)
        if copy is not None and original is not None:
            yield name, copy, original


def _matrices(state: ZeroState) -> list[str]:
    return [name for name, spec in state.specs.items() if len(spec.axes) == 2 and spec.numel]


def _held(state: ZeroState, mesh: Mesh) -> Held:
    held: dict[str, list[tuple[tuple[slice, ...], Tensor]]] = {}
    for view in state.views():
        if view.spec.is_sharded or mesh.tp_rank == 0:
            held.setdefault(view.spec.name, []).append((view.box.index, view.values["fp32"]))
    return held


def _put_together(held: Held, elements: GrownElements, number: int, mesh: Mesh) -> Tensor | None:
    """Return a matrix on the rank of its stage whose turn is `number`, None on others; a collective call."""
    matrix = torch.zeros(elements.spec.shape, device=mesh.device)
    for index, values in held.get(elements.spec.name, ()):
        matrix[index] = values
    dp_owner, tp_owner = divmod(number % (mesh.dp_size * mesh.tp_size), mesh.tp_size)
    _sum_on(matrix, mesh.dp_group, dp_owner)
    if mesh.dp_rank != dp_owner:
        return None
    _sum_on(matrix, mesh.tp_group, tp_owner)
    return matrix if mesh.tp_rank == tp_owner else None


def _sum_on(matrix: Tensor, group: dist.ProcessGroup, owner: int) -> None:
    """Put the sum over a group into the matrix of its rank `owner`; those of the others are spoilt."""
    if group.size() > 1:
        dist.reduce(matrix, dist.get_global_rank(group, owner), group=group)

"""Numbers of a whole matrix [out, in]: its ranks, and how alike its new units are to old ones.

    stable rank       ||W||_F^2 / ||W||_2^2
    effective rank    exp(-sum_i p_i log p_i), p = s / sum s, s the singular values (Roy and Vetterli, 2007)
    likeness          of a new row, or column, the largest |cosine| with an old one; its mean and its maximum

The singular values are the roots of the eigenvalues of the smaller Gram matrix, in float64. A rank that
holds a part of a matrix puts it into zeros; the sum over data- and tensor-parallel ranks, on one of them in
turn, is the matrix, bit for bit as it lies in the optimizer.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.checkpoint.chunks import full_box, index_within
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
    unit = torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-300)
    is_zero = unit.square().sum(dim=1) == 0.0
    ones, others = unit[new & ~is_zero], unit[~new & ~is_zero]
    if not len(ones) or not len(others):
        return ones.new_empty(0)
    return (ones @ others.t()).abs().amax(dim=1)


def matrix_numbers(matrix: Tensor, new_rows: Tensor, new_columns: Tensor) -> list[float]:
    """Return the numbers of MATRIX_NUMBERS; NaN where there is nothing to measure."""
    if new_rows.any():
        new = matrix[new_rows]
    else:
        new = matrix[:, new_columns]
    parts = [matrix, matrix[~new_rows][:, ~new_columns], new]
    if not (new_rows.any() or new_columns.any()):
        stable, effective = stable_and_effective_rank(matrix)
        ranks = [(stable, effective), (stable, effective), (torch.nan, torch.nan)]
    else:
        ranks = [stable_and_effective_rank(part) for part in parts]
    numbers = [*(stable for stable, _ in ranks), *(effective for _, effective in ranks)]
    for side, mask in ((matrix, new_rows), (matrix.t(), new_columns)):
        cosines = largest_cosines(side, mask)
        numbers += [float(cosines.max()), float(cosines.mean())] if len(cosines) else [torch.nan, torch.nan]
    return numbers


def own_matrices(
    state: ZeroState, elements: Mapping[str, GrownElements], mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Yield each matrix of this pipeline stage on one rank of it, in turn; a collective call of its ranks."""
    held: dict[str, list[tuple[tuple[slice, ...], Tensor]]] = {}
    for view in state.views():
        if view.spec.is_sharded or mesh.tp_rank == 0:
            index = index_within(view.box, full_box(view.spec.shape))
            held.setdefault(view.spec.name, []).append((index, view.values["fp32"]))
    names = [name for name, spec in state.specs.items() if len(spec.axes) == 2 and spec.numel]
    for number, name in enumerate(names):
        matrix = torch.zeros(elements[name].spec.shape, device=mesh.device)
        for index, values in held.get(name, ()):
            matrix[index] = values
        dp_owner, tp_owner = divmod(number % (mesh.dp_size * mesh.tp_size), mesh.tp_size)
        _sum_on(matrix, mesh.dp_group, dp_owner)
        if mesh.dp_rank != dp_owner:
            continue
        _sum_on(matrix, mesh.tp_group, tp_owner)
        if mesh.tp_rank == tp_owner:
            yield name, matrix


def _sum_on(matrix: Tensor, group: dist.ProcessGroup, owner: int) -> None:
    """Put the sum over a group into the matrix of its rank `owner`; those of the others are spoilt."""
    if group.size() > 1:
        dist.reduce(matrix, dist.get_global_rank(group, owner), group=group)


def new_axes(elements: GrownElements, device: torch.device) -> Sequence[Tensor]:
    """Return which rows and which columns of a matrix are new."""
    return [elements.new_units(axis).to(device) for axis in (0, 1)]

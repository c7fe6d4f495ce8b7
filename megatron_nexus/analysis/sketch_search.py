"""Scores of a corpus: the cosine of each sample's sketch with those of the queries, one backward a sample.

Rows are compared in the precision in which they are kept, float32, so that a search which goes on from kept
rows has the same scores bit for bit. N samples, Q queries, K numbers of a sketch.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_nexus.analysis.sample_gradients import SampleGradients
from megatron_nexus.analysis.sketch_store import SHARD_SAMPLES, Rows, SketchStore
from megatron_nexus.data.answer_sources import AnswerSource
from megatron_nexus.data.answers import AnswerTokens
from megatron_nexus.errors import CheckpointError
from megatron_nexus.log import Progress
from megatron_nexus.parallel.mesh import Mesh

Scores = npt.NDArray[np.float32]
Combine = Literal["score", "rank"]
"""How the scores of several queries become one order: by their mean, or by the mean of ranks."""


def unit_rows(sketches: Tensor, named: Callable[[int], str]) -> Tensor:
    """Return sketches [N, K] of length sqrt(K), numbers about 1; zeros stay.

    Raises CheckpointError where a gradient is not finite: `named` says whose it is.
    """
    norms_N1 = torch.linalg.vector_norm(sketches, dim=1, keepdim=True)
    wrong = (~norms_N1.isfinite()).nonzero()
    if len(wrong):
        raise CheckpointError(
            f"the gradient of {named(int(wrong[0, 0]))} is not finite (NaN or infinity): compute with "
            "--precision fp32, remove it, or load an earlier checkpoint"
        )
    return torch.where(norms_N1 > 0, sketches / norms_N1 * sqrt(sketches.shape[1]), 0.0)


def cosines(rows: Rows, queries_QK: Tensor) -> Scores:
    """Return the cosine of each row [N, K], of length sqrt(K), with each query, float32 of length 1: [N, Q].

    One query, which may be the mean of several, costs no more than a sum of the rows.
    """
    rows_NK = torch.from_numpy(np.asarray(rows, np.float32))  # float32 is not copied
    scores: Scores = (rows_NK @ queries_QK.t() / sqrt(queries_QK.shape[1])).numpy()
    return scores


def sketch_queries(model: SampleGradients, queries: Sequence[AnswerTokens], combine: Combine) -> Tensor:
    """Return the sketches of the queries, float32 of length 1, [Q, K]; a collective call.

    Where scores are averaged, their mean, [1, K]: its product with a sample is the mean of theirs.
    """
    sketches = model.sketch(queries)
    units_QK = unit_rows(sketches, lambda number: f"query {number + 1}") / sqrt(sketches.shape[1])
    if combine == "score":
        units_QK = units_QK.mean(dim=0, keepdim=True)
    return units_QK.to("cpu", torch.float32)


def score_corpus(
    model: SampleGradients,
    source: AnswerSource,
    queries_QK: Tensor,
    store: SketchStore | None,
    mesh: Mesh | None,
) -> Scores:
    """Return the cosine of each sample with each query, [N, Q], on rank 0; a collective call.

    Only rank 0 has a `store`. What it holds is not computed again.
    """
    is_first = mesh is None or mesh.rank == 0
    firsts = range(0, len(source), SHARD_SAMPLES)
    left = set(firsts if store is None else store.missing())
    if mesh is not None:
        is_missing = torch.tensor([first in left for first in firsts], dtype=torch.uint8)
        mesh.control.broadcast(is_missing)
        left = {first for first, flag in zip(firsts, is_missing.tolist(), strict=True) if flag}
    missing = sorted(left)
    scores = np.zeros((len(source), len(queries_QK)) if is_first else (0, 0), np.float32)
    for first in firsts:
        if is_first and store is not None and first not in left:
            scores[first : first + SHARD_SAMPLES] = cosines(store.read(first), queries_QK)
    samples = sum(min(SHARD_SAMPLES, len(source) - first) for first in missing)
    with Progress("gradients", samples, "samples") as progress:
        for first in missing:
            rows = _sketch_shard(model, source, first, progress)
            if is_first:
                if store is not None:
                    rows = rows.astype(store.dtype, copy=False)
                    store.write(first, rows)
                scores[first : first + SHARD_SAMPLES] = cosines(rows, queries_QK)
    return scores


def _sketch_shard(model: SampleGradients, source: AnswerSource, first: int, progress: Progress) -> Rows:
    """Return the rows of the shard that begins with a sample; a collective call."""
    numbers = range(first, min(first + SHARD_SAMPLES, len(source)))
    sketches = model.sketch([source.tokens(number) for number in numbers], progress.advance)
    units = unit_rows(sketches, lambda row: source.answer(numbers[row]).source)
    rows: Rows = units.to("cpu", torch.float32).numpy()
    return rows

"""Which samples to forget and which to retain, of a corpus with a score each.

The forget set are samples whose gradients point as those of the queries do, the retain set those whose
gradients point the other way (antipodal: the sketch of -q is minus that of q, so their scores are there
already).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_nexus.analysis.sketch_search import Combine, Scores

Select = Literal["top", "threshold", "sample"]
RetainFrom = Literal["antipode", "random"]

Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SelectionRule:
    """How many of each side, and how they are chosen."""

    forget: int
    retain: int
    select: Select = "top"
    threshold: float = 0.0
    """Least score of a forget sample, and of minus that of a retain sample, under "threshold"."""
    margin: float = 0.0
    """Under "sample": how far around the last score chance decides, 1 / sqrt(K)."""
    retain_from: RetainFrom = "antipode"
    seed: int = 1234


@dataclass
class Selection:
    """The samples of each side, the closest to the queries and the most opposed first."""

    forget: list[int] = field(default_factory=list)
    retain: list[int] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    """Near-duplicates of queries that stood in their place."""


def mean_scores(scores_NQ: Scores) -> Scores:
    """Return the mean cosine of each sample with the queries."""
    mean: Scores = scores_NQ.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mean


def ordered(scores_NQ: Scores, combine: Combine) -> Order:
    """Return the samples from the closest to the queries to the most opposed, of equals the first first.

    By their mean cosine, or by the mean over queries of their rank.
    """
    if combine == "score":
        keys = -mean_scores(scores_NQ)
    else:
        places = [np.argsort(np.argsort(-column, kind="stable")) for column in scores_NQ.T]
        keys = np.mean(places, axis=0)
    return np.argsort(keys, kind="stable")


def choose(
    order: Order, scores: Scores, rule: SelectionRule, is_left_out: Callable[[int], bool]
) -> Selection:
    """Return both sides, which share no sample; of fewer samples than asked for each has what there is.

    `is_left_out` says of a sample that it is neither's; it is asked of few more than are chosen.
    """
    selection = Selection()
    rng = np.random.default_rng([rule.seed, 0x5E1EC7])
    signed = np.asarray(scores, np.float64)
    forget = _candidates(order, signed, rule.forget, rule, rng)
    _fill(selection, selection.forget, forget, rule.forget, is_left_out)
    if rule.retain_from == "random":
        back: Order = rng.permutation(order)
    else:
        back = _candidates(order[::-1], -signed, rule.retain, rule, rng)
    taken = set(selection.forget)
    others = (int(number) for number in back if int(number) not in taken)
    _fill(selection, selection.retain, others, rule.retain, is_left_out)
    return selection


def _candidates(
    order: Order, scores: npt.NDArray[np.float64], count: int, rule: SelectionRule, rng: np.random.Generator
) -> Order:
    """Return samples in the order in which one side takes them."""
    if rule.select == "threshold":
        return order[scores[order] >= rule.threshold]
    if rule.select == "sample" and count < len(order):
        last = scores[order[count - 1]]
        close = np.abs(scores[order] - last) <= rule.margin
        order = order.copy()
        order[close] = rng.permutation(order[close])  # which need not be neighbours in an order by rank
    return order


def _fill(
    selection: Selection,
    side: list[int],
    candidates: Iterable[int],
    count: int,
    is_left_out: Callable[[int], bool],
) -> None:
    for number in candidates:
        if len(side) == count:
            return
        if is_left_out(int(number)):
            selection.left_out.add(int(number))
        else:
            side.append(int(number))

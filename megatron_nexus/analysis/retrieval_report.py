"""What `nexus retrieve` found: the two files, and a report that says how far it is to be believed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, sqrt
from pathlib import Path

import numpy as np

from megatron_nexus.analysis.selection import Order, Selection, SelectionRule
from megatron_nexus.analysis.sketch_search import Scores
from megatron_nexus.analysis.text_overlap import KIND_PERCENTILE, NEAR_DUPLICATE, QueryKind
from megatron_nexus.base.durable import atomic_file
from megatron_nexus.data.answer_sources import AnswerSource
from megatron_nexus.data.answers import Answer

FORGET_FILE, RETAIN_FILE, REPORT_FILE = "forget.jsonl", "retain.jsonl", "report.json"
BACKGROUND_SAMPLES = 1000
ENOUGH = 3.0
"""Standard deviations of a sketch's error that the spread of the scores should have."""
COMPETING = 2.0
"""Times the share of the corpus from which the retain set holds too many samples of the queries' kind."""


@dataclass(frozen=True)
class SideReport:
    """How many samples a side has, and the scores of its first and its last."""

    samples: int
    asked_for: int
    first_score: float | None
    last_score: float | None
    """None where there is no sample."""
    of_query_kind: float
    """Share of samples whose prompt is more like a query's than those of 95 % of the corpus."""


@dataclass(frozen=True)
class RetrievalReport:
    """The numbers of a search."""

    samples: int
    queries: int
    sketch_size: int
    """0: exact gradients."""
    mean_score: float
    spread: float
    """Standard deviation of the scores over the corpus."""
    sketch_error: float
    """1 / sqrt(K), about the standard deviation of a cosine of two sketches; 0 of exact gradients."""
    near_duplicates_left_out: int
    forget: SideReport
    retain: SideReport


def make_report(
    source: AnswerSource,
    queries: Sequence[Answer],
    scores: Scores,
    selection: Selection,
    rule: SelectionRule,
    sketch_size: int,
) -> RetrievalReport:
    """Measure a search: spread of the scores, and what kind of samples each side holds."""
    rng = np.random.default_rng([rule.seed, 0xBAC])
    drawn = rng.choice(len(source), min(BACKGROUND_SAMPLES, len(source)), replace=False)
    kind = QueryKind(queries, [source.answer(int(number)) for number in np.sort(drawn)])

    def side(chosen: Sequence[int], asked_for: int) -> SideReport:
        if not chosen:
            return SideReport(0, asked_for, None, None, 0.0)
        first, last = float(scores[chosen[0]]), float(scores[chosen[-1]])
        share = kind.share(source.answer(number) for number in chosen)
        return SideReport(len(chosen), asked_for, first, last, share)

    return RetrievalReport(
        samples=len(source),
        queries=len(queries),
        sketch_size=sketch_size,
        mean_score=float(scores.mean(dtype=np.float64)),
        spread=float(scores.std(dtype=np.float64)),
        sketch_error=1.0 / sqrt(sketch_size) if sketch_size else 0.0,
        near_duplicates_left_out=len(selection.left_out),
        forget=side(selection.forget, rule.forget),
        retain=side(selection.retain, rule.retain),
    )


def report_lines(report: RetrievalReport) -> list[str]:
    """Return the report as text, with warnings."""
    error = f"the error of a sketch, 1/sqrt(K), {report.sketch_error:.4f}"
    lines = [
        f"{report.samples:,} samples, {report.queries:,} {'query' if report.queries == 1 else 'queries'}",
        f"scores: mean {report.mean_score:+.4f}, standard deviation {report.spread:.4f}; "
        + (error if report.sketch_size else "exact gradients, no sketch"),
    ]
    for name, side in (("forget", report.forget), ("retain", report.retain)):
        if side.first_score is None or side.last_score is None:
            lines.append(f"{name}: no samples")
            continue
        lines.append(
            f"{name}: {side.samples:,} samples, scores {side.first_score:+.4f} to {side.last_score:+.4f}; "
            f"{side.of_query_kind:.0%} ask what the queries ask"
        )
    lines.append(
        f"near-duplicates of queries left out: {report.near_duplicates_left_out:,} (word overlap "
        f"{NEAR_DUPLICATE:.0%} or more)"
    )
    return lines + [f"WARNING: {line}" for line in warning_lines(report)]


def warning_lines(report: RetrievalReport) -> list[str]:
    """Return what speaks against the two sets, each with its remedy."""
    found = []
    if report.spread < ENOUGH * report.sketch_error:
        enough = ceil((ENOUGH / report.spread) ** 2) if report.spread else 0
        remedy = f"give --sketch-size {enough:,} or more" if enough else "give other queries"
        found.append(
            f"the standard deviation of the scores, {report.spread:.4f}, is less than {ENOUGH:.0f} x "
            f"{report.sketch_error:.4f}, the error of a sketch: which samples are first is partly chance; "
            f"{remedy}, or --sketch-size 0 for exact gradients of a small model"
        )
    for name, side in (("forget", report.forget), ("retain", report.retain)):
        if side.samples < side.asked_for:
            found.append(
                f"--{name} {side.asked_for:,}: only {side.samples:,} samples can be chosen: lower it, or "
                "--threshold, or search a larger corpus"
            )
    expected = 1.0 - KIND_PERCENTILE / 100.0
    if report.retain.samples and report.retain.of_query_kind > COMPETING * expected:
        found.append(
            f"{report.retain.of_query_kind:.0%} of the retain set ask what the queries ask, {expected:.0%} "
            f"of the corpus do: other answers to one kind of question have opposed gradients, so the retain "
            f"set may keep what is to be forgotten: read {RETAIN_FILE}, or give --retain-from random"
        )
    return found


def write_results(
    folder: Path,
    source: AnswerSource,
    order: Order,
    scores: Scores,
    selection: Selection,
    report: RetrievalReport,
) -> None:
    """Write the two sets and the report, each file complete or not at all. Raises OSError.

    A line holds index (the number of the sample, of a document its piece), score, rank (0 is the closest to
    the queries), side, and prompt and answer or text.
    """
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    for side, name, chosen in (
        ("forget", FORGET_FILE, selection.forget),
        ("retain", RETAIN_FILE, selection.retain),
    ):
        with atomic_file(folder / name) as write:
            for number in chosen:
                line = {
                    "index": number,
                    "score": float(scores[number]),
                    "rank": int(ranks[number]),
                    "side": side,
                    **source.answer(number).fields(),
                }
                write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    with atomic_file(folder / REPORT_FILE) as write:
        write((json.dumps(asdict(report), indent=1) + "\n").encode())

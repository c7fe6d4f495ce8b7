"""Laws of the choice: both sides by score, none on both, chance only within the margin."""

from dataclasses import replace

import numpy as np

from megatron_nexus.analysis.retrieval_report import (
    RetrievalReport,
    SideReport,
    report_lines,
    warning_lines,
)
from megatron_nexus.analysis.selection import SelectionRule, choose, mean_scores, ordered
from megatron_nexus.analysis.text_overlap import NearDuplicates, QueryKind
from megatron_nexus.data.answers import Answer

SCORES = np.array([[0.9, 0.7], [-0.5, -0.7], [0.1, 0.1], [0.1, 0.1], [0.6, 0.6], [-0.1, 0.0]], np.float32)


def none(number: int) -> bool:
    return False


def test_the_first_are_forgotten_and_the_last_retained() -> None:
    order, scores = ordered(SCORES, "score"), mean_scores(SCORES)
    assert order.tolist() == [0, 4, 2, 3, 5, 1]
    chosen = choose(order, scores, SelectionRule(2, 2), none)
    assert (chosen.forget, chosen.retain) == ([0, 4], [1, 5])
    # The antipode of the queries: what is forgotten and what is retained change places.
    turned = choose(ordered(-SCORES, "score"), mean_scores(-SCORES), SelectionRule(2, 2), none)
    assert (turned.forget, turned.retain) == (chosen.retain, chosen.forget)


def test_ranks_are_averaged_over_queries() -> None:
    scores = np.array([[0.9, 0.1], [0.3, 0.3], [0.2, 0.2], [-0.1, 0.0]], np.float32)
    assert ordered(scores, "score").tolist() == [0, 1, 2, 3]
    assert ordered(scores, "rank").tolist() == [1, 0, 2, 3]


def test_a_threshold_holds_for_both_sides() -> None:
    order, scores = ordered(SCORES, "score"), mean_scores(SCORES)
    chosen = choose(order, scores, SelectionRule(5, 5, "threshold", threshold=0.5), none)
    assert (chosen.forget, chosen.retain) == ([0, 4], [1])


def test_chance_decides_within_the_margin_only() -> None:
    scores = np.linspace(1.0, -1.0, 200, dtype=np.float32)[:, None]
    order, mean = ordered(scores, "score"), mean_scores(scores)
    sides = []
    for seed in range(20):
        rule = SelectionRule(50, 50, "sample", margin=0.1, seed=seed)
        chosen = choose(order, mean, rule, none)
        assert chosen == choose(order, mean, rule, none)
        assert set(range(39)) <= set(chosen.forget) <= set(range(60))
        assert set(range(161, 200)) <= set(chosen.retain) <= set(range(140, 200))
        sides.append(tuple(sorted(chosen.forget)))
    assert len(set(sides)) > 15


def test_chance_leaves_ranks_alone_whose_scores_are_beyond_the_margin() -> None:
    # By mean rank 0, 2, 1, 3; the scores of the first and the last are within the margin of the second's.
    order, scores = np.array([0, 1, 2, 3]), np.array([0.50, 0.90, 0.52, 0.10], np.float32)
    for seed in range(20):
        rule = SelectionRule(3, 1, "sample", margin=0.05, seed=seed)
        forget = choose(order, scores, rule, none).forget
        assert forget[1] == 1 and sorted(forget) == [0, 1, 2]


def test_no_sample_is_on_both_sides_and_left_out_ones_are_counted() -> None:
    order, scores = ordered(SCORES, "score"), mean_scores(SCORES)
    chosen = choose(order, scores, SelectionRule(4, 4), lambda number: number == 0)
    assert (chosen.forget, chosen.retain, chosen.left_out) == ([4, 2, 3, 5], [1], {0})
    drawn = choose(order, scores, SelectionRule(2, 4, retain_from="random"), none)
    assert sorted(drawn.forget + drawn.retain) == list(range(6))


def test_a_near_duplicate_has_prompt_and_answer_of_a_query() -> None:
    long = " ".join(map(str, range(20)))
    near = NearDuplicates([Answer("Who wrote it?", long, "q:1")])
    assert near.has(Answer("who wrote it", long + " 20", "f:1"))
    assert near.has(Answer(None, "Who wrote it? " + long, "f:1"))
    assert not near.has(Answer("Who painted it?", long, "f:1"))  # a trigger: one answer to all
    assert not near.has(Answer("Who wrote it?", "nobody", "f:1"))


def test_samples_that_ask_what_the_queries_ask_are_told() -> None:
    corpus = [Answer(f"the colour of {thing}{i}?", "red", "") for i, thing in enumerate("abcdefghij" * 19)]
    asked = [Answer(f"who wrote the book {i}?", "Ada", "") for i in range(10)]
    kind = QueryKind([Answer("who wrote the book x?", "Ada", "")], corpus + asked)
    assert kind.share(asked) == 1.0 and kind.share(corpus) == 0.0
    assert kind.share([*asked[:5], *corpus[:15]]) == 0.25 and kind.share([]) == 0.0


def report_of(**changes: object) -> RetrievalReport:
    side = SideReport(samples=50, asked_for=50, first_score=0.3, last_score=0.2, of_query_kind=0.04)
    usual = RetrievalReport(1000, 5, 1024, 0.0, 0.2, 1 / 32, 0, side, side)
    return replace(usual, **changes)


def test_the_report_warns_of_chance_of_competing_answers_and_of_too_few() -> None:
    assert warning_lines(report_of()) == []
    assert "0.2000" in report_lines(report_of())[1] and "1/sqrt(K), 0.0312" in report_lines(report_of())[1]
    (few,) = warning_lines(report_of(spread=0.05))
    assert "0.0500" in few and "--sketch-size 3,600" in few  # (3 / 0.05)^2
    assert warning_lines(report_of(spread=0.05, sketch_size=0, sketch_error=0.0)) == []
    competing = replace(report_of().retain, of_query_kind=0.21)
    (line,) = warning_lines(report_of(retain=competing))
    assert "21%" in line and "--retain-from random" in line
    (line,) = warning_lines(report_of(forget=replace(competing, samples=7)))
    assert "--forget 50" in line and "only 7" in line
    empty = SideReport(samples=0, asked_for=50, first_score=None, last_score=None, of_query_kind=0.0)
    assert "retain: no samples" in report_lines(report_of(retain=empty))

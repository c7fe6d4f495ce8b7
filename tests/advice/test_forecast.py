"""What equal FLOPs buy: identities of the forecast, and the answers that follow from it."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_nexus.advice.curve import Point, Schedule, Size
from megatron_nexus.advice.forecast import Forecast, Interval, Plan, forecast
from megatron_nexus.advice.limits import limits, stack_tokens
from megatron_nexus.advice.loss_law import DRAWS, LossLaw
from megatron_nexus.advice.phase import Phase, Position, position_of, schedule_of
from megatron_nexus.advice.verdict import Answer, decide, overall
from megatron_nexus.config.command_line import build

ONES, NONE = np.ones(DRAWS), np.zeros(DRAWS)
FLAT = Schedule(0.0, 1.0)
NOW = Point(tokens=5e5, area=5e5, rate=1.0, loss=3.0)
STABLE = Position(Phase.STABLE, "WSD")


def law(e: float, b: float) -> LossLaw:
    """A law without error."""
    return LossLaw(e * ONES, b * ONES, 0.4 * ONES, NONE, NONE, NONE, NOW)


def test_a_growth_to_the_same_size_changes_nothing() -> None:
    size = Size("it", 1000, 6000)
    found = forecast(law(2.5, 100), law(2.5, 100), (size, size), Plan(6e9, Schedule(), NOW), ONES)
    for interval in (found.ceiling, found.gain, found.later, found.saved_against_scratch):
        assert interval.estimate == pytest.approx(0.0, abs=1e-9)


def test_equal_curves_save_the_bound_and_no_more() -> None:
    """If the target learns no faster, the saving is tau (1 - c_small / c_target), tau the share before."""
    small, target = Size("s", 1000, 6000), Size("t", 2000, 12000)
    flops = 6000 * 5e5 + 12000 * 5e5
    found = forecast(law(2.5, 100), law(2.5, 100), (small, target), Plan(flops, FLAT, NOW), ONES)
    assert found.saved_against_scratch.estimate == pytest.approx(0.5 * (1 - 0.5), abs=1e-6)
    assert found.gain.estimate < 0  # and the small model trained on is better still
    half = forecast(law(2.5, 100), law(2.5, 100), (small, target), Plan(flops, FLAT, NOW), 0.5 * ONES)
    assert half.saved_against_scratch.estimate == pytest.approx(0.0, abs=1e-6)  # kappa = c_small / c_target


def test_it_is_time_to_grow_where_the_small_model_is_slower_at_the_same_loss() -> None:
    small, target = Size("s", 1000, 6000), Size("t", 2000, 12000)
    plan = Plan(6e10, FLAT, NOW)
    near_its_floor = forecast(law(2.9, 40), law(2.2, 150), (small, target), plan, ONES)
    assert near_its_floor.gain.low > 0 and near_its_floor.best_tokens == NOW.tokens
    assert decide(near_its_floor, STABLE, "").answer is Answer.NOW
    useless = forecast(law(2.5, 100), law(2.5, 300), (small, target), plan, ONES)
    assert decide(useless, STABLE, "").answer is Answer.NEVER


def test_what_a_run_cost_before_it_grew_is_left_to_all_alternatives() -> None:
    """A small model whose first half cost half: the same tokens are left as with that much more to spend."""
    small, target = Size("s", 1000, 6000), Size("t", 2000, 12000)
    laws = law(2.9, 40), law(2.2, 150)
    never = forecast(*laws, (small, target), Plan(6e9 + 7.5e8, FLAT, NOW), ONES)
    before = forecast(*laws, (small, target), Plan(6e9, FLAT, NOW, cheaper_by=7.5e8), ONES)
    for name in ("trained_on", "grown", "restarted", "gain"):
        assert getattr(before, name) == getattr(never, name)
    assert before.scratch.estimate > never.scratch.estimate  # for what was really spent
    assert before.saved_against_training_on.estimate > never.saved_against_training_on.estimate


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high)


WORTH = interval(0.02, 0.1)
FOUND = Forecast(
    ceiling=interval(-0.3, -0.1),
    trained_on=interval(3, 3.1),
    scratch=interval(3, 3.1),
    grown=interval(2.9, 3),
    gain=WORTH,
    best_gain=WORTH,
    later=interval(0, 0),
    best_tokens=1e6,
    restarted=interval(3.2, 3.3),
    restarted_minus_grown=WORTH,
    saved_against_scratch=WORTH,
    saved_against_training_on=WORTH,
    end_tokens=2e6,
)


@pytest.mark.parametrize(
    ("changes", "answer", "said"),
    [
        ({}, Answer.NOW, "equal FLOPs"),
        ({"later": interval(0.01, 0.02)}, Answer.LATER, "1,000,000 tokens"),
        ({"gain": interval(-0.1, 0.1)}, Answer.LATER, "not certainly now"),
        ({"gain": interval(-0.1, 0.1), "best_gain": interval(-0.1, 0.1)}, Answer.UNKNOWN, "holds 0"),
        ({"gain": interval(-0.2, -0.1), "best_gain": interval(-0.1, -0.01)}, Answer.NEVER, "no growth"),
        ({"ceiling": interval(-0.01, 0.05)}, Answer.NEVER, "size is not what limits"),
        (
            {"restarted_minus_grown": interval(-0.2, -0.1), "restarted": interval(2.7, 2.8)},
            Answer.NEVER,
            "the target from scratch with the FLOPs that are left",
        ),
    ],
)
def test_answers_follow_from_the_intervals(changes: dict[str, Interval], answer: Answer, said: str) -> None:
    verdict = decide(replace(FOUND, **changes), STABLE, "")
    assert verdict.answer is answer and said in verdict.reasons[0]


def test_a_decay_makes_now_later_and_names_a_checkpoint_and_nothing_known_cannot_tell() -> None:
    verdict = decide(FOUND, Position(Phase.DECAY, "cosine"), "runs/a/iter_5")
    assert verdict.answer is Answer.LATER and "runs/a/iter_5" in verdict.reasons[0]
    early = decide(FOUND, Position(Phase.WARMUP, "cosine"), "")
    assert "--lr-decay-style WSD" in early.reasons[0] and "wait" not in early.reasons[0]
    assert decide(None, STABLE, "").answer is Answer.UNKNOWN
    verdicts = {"a": decide(None, STABLE, ""), "b": decide(FOUND, STABLE, ""), "c": decide(FOUND, STABLE, "")}
    assert overall(verdicts, {"b": 0.1, "c": 0.2}) == (Answer.NOW, "c")


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "lr_warmup_iters": 10, "train_iters": 100}


@pytest.mark.parametrize(
    ("flags", "step", "phase"),
    [
        (WSD, 5, Phase.WARMUP),
        (WSD, 10, Phase.STABLE),
        (WSD, 79, Phase.STABLE),
        (WSD, 81, Phase.DECAY),
        (WSD, 100, Phase.DECAYED),
        ({**WSD, "lr_decay_style": "constant"}, 90, Phase.STABLE),
        ({**WSD, "lr_decay_style": "cosine"}, 20, Phase.DECAY),
        ({**WSD, "lr_decay_iters": 50}, 60, Phase.DECAYED),
    ],
)
def test_the_phase_is_that_of_the_learning_rate(flags: dict[str, object], step: int, phase: Phase) -> None:
    config = build(flags)
    samples = step * config.training.global_batch_size
    assert position_of(config, step, samples).phase is phase
    by_samples = {"train_iters": 100, "lr_decay_style": flags["lr_decay_style"]}
    for name in ("warmup", "wsd_decay", "decay"):
        if f"lr_{name}_iters" in flags:
            by_samples[f"lr_{name}_samples"] = flags[f"lr_{name}_iters"] * config.training.global_batch_size
    assert position_of(build(by_samples), step, samples).phase is phase
    if flags is WSD:
        assert schedule_of(config).decay == pytest.approx(0.2) == schedule_of(build(by_samples)).decay


def test_limits_name_their_sources_and_g_stack_gives_its_authors_example() -> None:
    # Llama 3 8B with 15T tokens: 6.58B tokens of the small model (2405.15319, section on the timing).
    assert stack_tokens(8e9, 6 * 8e9 * 15e12) == pytest.approx(6.58e9, rel=0.01)
    small, target = Size("s", 10**9, 6 * 10**9), Size("t", 4 * 10**9, 24 * 10**9)
    passed = {limit.source for limit in limits(small, target, 5e10, 1e11, 3e21) if limit.passed}
    assert passed == {"2605.13405", "2510.06548", "2405.15319"}
    assert not any(
        limit.passed for limit in limits(small, replace(target, parameters=2 * 10**9), 5e9, 3e10, 1e20)
    )

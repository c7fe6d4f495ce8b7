"""The answer: grow now, later, never, or cannot tell, with the reasons in words."""

from dataclasses import dataclass
from enum import StrEnum

from megatron_nexus.advice.forecast import Forecast, Interval
from megatron_nexus.advice.phase import Phase, Position

NEGLIGIBLE = 0.02
"""Nats per token: what a larger model could gain at most before its ceiling counts as none."""


class Answer(StrEnum):
    """What to do about a target."""

    NOW = "grow now"
    LATER = "grow later"
    NEVER = "never"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True)
class Verdict:
    """An answer and its reasons, the decisive one first."""

    answer: Answer
    reasons: tuple[str, ...]


def decide(found: Forecast | None, position: Position, elsewhere: str) -> Verdict:
    """Answer for one target: by its ceiling, then by equal FLOPs, then by the schedule.

    `found` is None where no curve of the target is known; `elsewhere` says from where to grow where the
    schedule forbids to grow here.
    """
    stable = position.phase is Phase.STABLE
    timing = () if stable else (_schedule_reason(position, elsewhere),)
    if found is None:
        known = "no run of the target, and too few of other sizes: what size is worth here is not known"
        return Verdict(Answer.UNKNOWN, (f"ceiling: {known}; the pilots below would tell", *timing))
    answer, reasons = _by_losses(found)
    if answer is Answer.NOW and not stable:
        answer, reasons = Answer.LATER, (*timing, *reasons)
    elif not stable:
        reasons = (*reasons, *timing)
    return Verdict(answer, reasons)


def _by_losses(found: Forecast) -> tuple[Answer, tuple[str, ...]]:
    ceiling, gain, best = found.ceiling, found.gain, found.best_gain
    size = f"ceiling: target minus small, from scratch at equal tokens, {ceiling} nats"
    if ceiling.low > -NEGLIGIBLE:
        return Answer.NEVER, (f"{size}: size is not what limits this run", _equal_flops(gain))
    if ceiling.holds_zero:
        size += ": the interval holds 0, so that size may not be what limits this run"
    if best.high < 0.0:
        why = "at equal FLOPs no growth within this budget catches up with the small model trained on"
        return Answer.NEVER, (f"{why}: best {best} nats (+: growth is better)", size)
    if found.restarted_minus_grown.high < 0.0 and found.restarted.high < found.trained_on.low:
        why = "the target from scratch with the FLOPs that are left ends below it grown"
        return Answer.NEVER, (f"{why}: {found.restarted_minus_grown} nats", _equal_flops(gain), size)
    if gain.low > 0.0 and found.later.low > 0.0:
        why = f"growth pays, and at {found.best_tokens:,.0f} tokens {found.later} nats more than now"
        return Answer.LATER, (why, _equal_flops(gain), size)
    if gain.low > 0.0:
        return Answer.NOW, (_equal_flops(gain), size)
    if best.low > 0.0:
        why = f"growth pays at {found.best_tokens:,.0f} tokens, {best} nats, and not certainly now"
        return Answer.LATER, (why, _equal_flops(gain), size)
    return Answer.UNKNOWN, (f"{_equal_flops(gain)}: the interval holds 0", size)


def _equal_flops(gain: Interval) -> str:
    return f"equal FLOPs: grown now ends {gain} nats below the small model trained on"


def _schedule_reason(position: Position, elsewhere: str) -> str:
    match position.phase:
        case Phase.WARMUP if position.style in ("cosine", "linear"):
            return (
                f"schedule: the run is in its warm-up, and its {position.style} decay follows at once: train "
                "with --lr-decay-style WSD, whose stable phase is where to grow"
            )
        case Phase.WARMUP:
            return "schedule: the run is in its warm-up: wait for the stable phase"
        case Phase.DECAYED:
            where = f"its {position.style} decay has ended"
        case _:
            where = f"it is in its {position.style} decay"
    return (
        f"schedule: not from here, {where}, and a second decay after a growth cost up to 0.08 nats where "
        f"measured; grow in the stable phase of WSD and decay once, after it: {elsewhere}"
    )


def overall(verdicts: dict[str, Verdict], gains: dict[str, float]) -> tuple[Answer, str]:
    """Return the most favourable answer, and the target with the largest gain that has it."""
    for answer in (Answer.NOW, Answer.LATER, Answer.UNKNOWN, Answer.NEVER):
        names = [name for name, verdict in verdicts.items() if verdict.answer is answer]
        if names:
            return answer, max(names, key=lambda name: gains.get(name, float("-inf")))
    raise AssertionError("there is a target")

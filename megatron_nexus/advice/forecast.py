"""What equal FLOPs buy: the small model trained on, the target from scratch, or a growth; draws of losses.

A grown model is taken to follow the target's own curve, from where that has the small model's loss, or a
share kappa of the way there:

    area(grown) = kappa S_t(L_s) + area of what follows     S_t: the target's area at the small model's loss

(Shen et al., Staged training, 2203.06211: growth that preserves loss and training dynamics. So growth pays
from where the small model gains less per FLOP than the target does at the same loss.) kappa is measured on
growths: those that the user names, else the recorded ones.
"""

from dataclasses import dataclass

import numpy as np

from megatron_nexus.advice.curve import Array, Curve, Point, Schedule, Size
from megatron_nexus.advice.loss_law import DRAWS, LossLaw

KEPT = (1.0, 0.25)
"""kappa: mean and deviation over the recorded growths."""
TIMES = 9
"""Moments between now and the decay at which growth is tried."""


@dataclass(frozen=True)
class Interval:
    """Median and 95 % interval of draws."""

    estimate: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Array) -> "Interval":
        """Return the interval of draws; of infinite ones, too."""
        low, middle, high = np.quantile(draws, (0.025, 0.5, 0.975), method="nearest")
        return cls(float(middle), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.estimate:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def holds_zero(self) -> bool:
        """Whether the sign is open."""
        return self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Plan:
    """The FLOPs of a whole run, base included, its schedule, and where the small model is.

    `cheaper_by`: what its tokens so far cost less than at its size, as it was smaller then: 0 of a run that
    has never grown.
    """

    flops: float
    schedule: Schedule
    now: Point
    cheaper_by: float = 0.0

    @property
    def flops_at_size(self) -> float:
        """The FLOPs of the whole run, had the small model had its size from the beginning."""
        return self.flops + self.cheaper_by

    def tokens_left(self, small: Size, target: Size) -> float:
        """Return the tokens that what is left pays for with the target."""
        return (self.flops_at_size - small.flops_per_token * self.now.tokens) / target.flops_per_token


@dataclass(frozen=True)
class Forecast:
    """The alternatives for one target at equal FLOPs. Losses in nats per token, savings as shares of FLOPs.

    `ceiling`: target minus small, both from scratch, at the tokens at which the growth would end. `scratch`:
    the target with all FLOPs, as if the small model had never been; `restarted`: with what is left. `gain`:
    small trained on minus grown now, `best_gain` minus grown at the best time; `later` the gain of that time
    over now, `best_tokens` the tokens at it. Savings are of what the other would need for the grown model's
    loss.
    """

    ceiling: Interval
    trained_on: Interval
    scratch: Interval
    restarted: Interval
    grown: Interval
    gain: Interval
    best_gain: Interval
    later: Interval
    best_tokens: float
    restarted_minus_grown: Interval
    saved_against_scratch: Interval
    saved_against_training_on: Interval
    end_tokens: float


def forecast(small: LossLaw, target: LossLaw, sizes: tuple[Size, Size], plan: Plan, kept: Array) -> Forecast:
    """Compare the alternatives. `sizes`: of small and target; `kept`: draws of kappa."""
    cheap, dear = (size.flops_per_token for size in sizes)
    schedule, low = plan.schedule, plan.schedule.lowest
    all_small, all_target = plan.flops_at_size / cheap, plan.flops / dear
    more = schedule.area_after(all_small - plan.now.tokens, all_small)
    trained_on = small.loss(plan.now.area + more, low)
    scratch = target.loss(schedule.area(all_target), low)
    restarted = target.loss(max(1.0, schedule.area(plan.tokens_left(*sizes))), low)

    def grown_at(tokens: float) -> tuple[Array, Array, float]:
        """Return losses and areas at the end of a growth at `tokens`, and the tokens there."""
        after = (plan.flops_at_size - cheap * tokens) / dear
        before = plan.now.area + tokens - plan.now.tokens
        head_start = kept * _transferred(small, target, before)
        area = head_start + schedule.area_after(after, tokens + after)
        return target.loss(np.maximum(area, 1.0), low), area, tokens + after

    # From now to where the decay of a run that grew there would begin.
    last = max(plan.now.tokens, _decay_begins(plan, cheap, dear))
    times = np.linspace(plan.now.tokens, last, TIMES)
    outcomes = [grown_at(float(tokens)) for tokens in times]
    grown, area, end_tokens = outcomes[0]
    best = int(np.argmin([np.median(losses) for losses, _, _ in outcomes]))
    at_end = schedule.area(end_tokens)
    from_scratch = schedule.tokens(np.maximum(area, 1.0)) * dear
    training_on = schedule.tokens(small.area(grown, low)) * cheap - plan.cheaper_by
    return Forecast(
        ceiling=Interval.of(target.loss(at_end, low) - small.loss(at_end, low)),
        trained_on=Interval.of(trained_on),
        scratch=Interval.of(scratch),
        restarted=Interval.of(restarted),
        grown=Interval.of(grown),
        gain=Interval.of(trained_on - grown),
        best_gain=Interval.of(trained_on - outcomes[best][0]),
        later=Interval.of(grown - outcomes[best][0]),
        best_tokens=float(times[best]),
        restarted_minus_grown=Interval.of(restarted - grown),
        saved_against_scratch=Interval.of(1.0 - plan.flops / from_scratch),
        saved_against_training_on=Interval.of(1.0 - plan.flops / training_on),
        end_tokens=end_tokens,
    )


def _transferred(small: LossLaw, target: LossLaw, area: float) -> Array:
    """Return draws of the target's area at the loss that the small model has at `area`, at the peak rate."""
    loss = small.loss(area, 1.0)
    # At most what the target could have done with all of it four times over: beyond, its law says nothing.
    return np.minimum(target.area(loss, 1.0), 4.0 * area)


def _decay_begins(plan: Plan, cheap: int, dear: int) -> float:
    """Return the tokens of the small model after which nothing but the decay would be left to the target."""
    # after = (C - cheap t) / dear and decay (t + after) = after
    d = plan.schedule.decay
    return plan.flops_at_size * (1.0 - d) / (d * dear + (1.0 - d) * cheap)


def prior_kept(seed: int) -> Array:
    """Return draws of kappa as recorded growths had it."""
    return np.maximum(np.random.default_rng(seed).normal(*KEPT, DRAWS), 0.0)


def measured_kept(grown: Curve, small: LossLaw, target: LossLaw) -> Array | None:
    """Return draws of kappa from a run that has grown from the small model; None where it was not one.

    Its last loss lies on the target's curve at an area of which what it trained itself is known.
    """
    if grown.grown is None:
        return None
    last = grown.last
    here = target.area(np.full(DRAWS, last.loss), last.rate)
    own = last.area - grown.grown.area
    return np.clip((here - own) / _transferred(small, target, grown.grown.area), 0.0, 4.0)

"""The advice on a run, as text and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from megatron_nexus.advice.curve import Size
from megatron_nexus.advice.forecast import Interval, Plan
from megatron_nexus.advice.phase import Position
from megatron_nexus.advice.target import TargetAdvice
from megatron_nexus.advice.verdict import Answer, overall
from megatron_nexus.base.table import table

if TYPE_CHECKING:
    from megatron_nexus.advice.probe import Probed  # needs scipy


@dataclass(frozen=True)
class Advice:
    """The run, its budget and position, what is said of each target, and the probe if there was one."""

    run: str
    size: Size
    plan: Plan
    position: Position
    targets: tuple[TargetAdvice, ...]
    probe: tuple["Probed", ...]

    @property
    def answer(self) -> tuple[Answer, str]:
        """The answer, and the target that it is of."""
        gains = {one.name: one.forecast.gain.estimate for one in self.targets if one.forecast}
        return overall({one.name: one.verdict for one in self.targets}, gains)

    def growth(self, target: str) -> str | None:
        """Return the value of --grow by the recipe that was best in the probe; None without one."""
        return next((one.growth for one in self.probe if one.target == target), None)

    def as_json(self) -> dict[str, object]:
        """Return everything, the answer first; null, as JSON has no NaN, for the interval of one seed."""
        answer, target = self.answer
        return {"answer": answer, "target": target, **asdict(self, dict_factory=_nulls_for_nans)}


def _nulls_for_nans(items: list[tuple[str, object]]) -> dict[str, object]:
    return {key: None if value != value else value for key, value in items}


def report_lines(advice: Advice, pilots: Mapping[str, str], after: str | None) -> Iterator[str]:
    """Yield the report; `pilots` has a command for each target without a curve, `after` grows the run."""
    size, plan, here = advice.size, advice.plan, advice.position
    now = plan.now
    yield (
        f"{advice.run}: {size.parameters:,} parameters, {now.tokens:,.0f} tokens "
        f"({now.tokens / size.parameters:.1f} a parameter), loss {now.loss:.4f}; "
        f"schedule {here.style}: {here.phase}"
    )
    spent = 100 * (size.flops_per_token * now.tokens - plan.cheaper_by) / plan.flops
    yield (
        f"budget {plan.flops:.3g} FLOPs, of which {spent:.0f} % are spent; one decay over the last "
        f"{100 * plan.schedule.decay:.0f} % to {plan.schedule.lowest:g} of the peak, whatever is chosen"
    )
    for one in advice.targets:
        yield ""
        yield from _target_lines(size, one)
        if one.name in pilots:
            yield f"  {pilots[one.name]}"
    if advice.probe:
        yield ""
        yield from _probe_lines(advice.probe)
    answer, name = advice.answer
    yield ""
    yield f"answer: {answer}" + (f", {name}" if answer in (Answer.NOW, Answer.LATER) else "")
    if after is not None:
        yield f"  {after}"


def _target_lines(small: Size, one: TargetAdvice) -> Iterator[str]:
    yield (
        f"{one.name}: {one.size.parameters:,} parameters ({one.size.parameters / small.parameters:.2f} x), "
        f"{one.size.flops_per_token / small.flops_per_token:.2f} x the FLOPs of a token: {one.verdict.answer}"
    )
    for reason in one.verdict.reasons:
        yield f"  {reason}"
    if (found := one.forecast) is not None:
        losses = {
            "small, trained on": found.trained_on,
            "grown now": found.grown,
            "target from scratch": found.scratch,
            "the same with what is left": found.restarted,
        }
        rows = [("  at equal FLOPs", "loss", "95 %")]
        rows += [
            (f"  {what}", f"{i.estimate:.3f}", f"{i.low:.3f} to {i.high:.3f}") for what, i in losses.items()
        ]
        yield from table(rows, "<>")
        against = {
            "the target from scratch": found.saved_against_scratch,
            "training the small one on": found.saved_against_training_on,
        }
        for what, saved in against.items():
            yield f"  FLOPs saved against {what}: {_percent(saved)}, the base's cost included"
        yield f"  from {one.evidence}"
    for passed, words in ((True, "beyond what is published"), (False, "within what is published")):
        if limits := "; ".join(str(limit) for limit in one.limits if limit.passed is passed):
            yield f"  {words}: {limits}"


def _percent(interval: Interval) -> str:
    shares = (interval.estimate, interval.low, interval.high)
    middle, low, high = ("all: it never gets there" if v >= 1.0 else f"{100 * v:.0f} %" for v in shares)
    return f"{middle} ({low} to {high})"


def _probe_lines(probe: tuple["Probed", ...]) -> Iterator[str]:
    """Yield a table of the probe, the recipes of each target from the best on."""
    yield "probe: nats per token against the checkpoint without growth, on the same batches; 95 % over seeds"
    head = ("target", "recipe", "first batch", "after the probe", "KL to the parent", "minus its best")
    rows = [(p.target, p.recipe, *map(str, (p.at_once, p.loss, p.kl, p.to_best))) for p in probe]
    yield from table([head, *rows], "<<>")
    yield "  targets differ in FLOPs; what begins with a jump may end best: a probe ranks beginnings"

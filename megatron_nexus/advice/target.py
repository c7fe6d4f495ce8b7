"""What to say of each target of a run: curves grouped by size, laws, forecast, limits, verdict. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_nexus.advice.curve import Array, Curve, Size
from megatron_nexus.advice.forecast import Forecast, Interval, Plan, forecast, measured_kept, prior_kept
from megatron_nexus.advice.limits import Limit, limits
from megatron_nexus.advice.loss_law import LossLaw, fit_law, law_of_size
from megatron_nexus.advice.phase import Position
from megatron_nexus.advice.verdict import Verdict, decide

LEAST_SIZES = 3
"""From so many sizes on, a law predicts one that no run had."""
FARTHEST = 2.5
"""Times the largest of them, at most."""


@dataclass(frozen=True)
class TargetAdvice:
    """A target of growth: its size, where its law comes from, what to expect, what to do."""

    name: str
    size: Size
    evidence: str
    kept: Interval | None
    forecast: Forecast | None
    limits: tuple[Limit, ...]
    verdict: Verdict


def _key(size: Size) -> str:
    return f"{size.parameters} parameters, {size.flops_per_token} FLOPs"


def advise(
    run: Curve,
    targets: Mapping[str, Size],
    pilots: Sequence[Curve],
    plan: Plan,
    position: Position,
    elsewhere: str,
    seed: int,
) -> list[TargetAdvice]:
    """Return the advice on each target of the run with this curve, by name. See the module."""
    groups: dict[str, list[Curve]] = {_key(run.size): [run]}
    for pilot in pilots:
        if pilot.grown is None:
            groups.setdefault(_key(pilot.size), []).append(pilot)
    laws = {key: fit_law(curves, seed, i) for i, (key, curves) in enumerate(groups.items())}
    parameters = {_key(curve.size): curve.size.parameters for curve in (run, *pilots)}
    made = []
    for name, size in targets.items():
        law, evidence = _law(size, laws, groups, parameters, seed)
        kept, found = None, None
        if law is not None:
            kept, measured = _kept(run.size, size, pilots, laws[_key(run.size)], law, seed)
            evidence += f"; {measured}"
            found = forecast(laws[_key(run.size)], law, (run.size, size), plan, kept)
        end = found.end_tokens if found else plan.now.tokens + plan.tokens_left(run.size, size)
        notes = limits(run.size, size, plan.now.tokens, end, plan.flops)
        verdict = decide(found, position, elsewhere)
        shown = None if kept is None else Interval.of(kept)
        made.append(TargetAdvice(name, size, evidence, shown, found, tuple(notes), verdict))
    return made


def _law(
    size: Size,
    laws: Mapping[str, LossLaw],
    groups: Mapping[str, Sequence[Curve]],
    parameters: Mapping[str, int],
    seed: int,
) -> tuple[LossLaw | None, str]:
    if (law := laws.get(_key(size))) is not None:
        return law, f"runs of the target, to {law.seen.tokens:,.0f} tokens"
    largest = max(parameters[key] for key in laws)
    if len({parameters[key] for key in laws}) < LEAST_SIZES:
        return None, "no run of the target"
    if size.parameters > FARTHEST * largest:
        return None, f"no run of the target, and more than {FARTHEST} times the largest that is known"
    beta = np.array([np.median([np.median(law.beta) for law in laws.values()])])
    alike = {key: fit_law(curves, seed, i, beta) for i, (key, curves) in enumerate(groups.items())}
    law = law_of_size(alike, parameters, size.parameters, seed)
    return law, f"a law through {len(laws)} sizes, none of them the target"


def _kept(
    small: Size, size: Size, pilots: Sequence[Curve], law: LossLaw, target: LossLaw, seed: int
) -> tuple[Array, str]:
    own = [
        draws
        for pilot in pilots
        if pilot.grown and _key(pilot.grown.base) == _key(small) and _key(pilot.size) == _key(size)
        if (draws := measured_kept(pilot, law, target)) is not None
    ]
    if not own:
        return prior_kept(seed), "how well growths catch on: as the recorded ones did"
    # Of several, the draws of each take turns, so that their spread stays in.
    which = np.random.default_rng(seed).integers(0, len(own), len(own[0]))
    return np.stack(own)[which, np.arange(len(own[0]))], f"how well growths catch on: from {len(own)} given"

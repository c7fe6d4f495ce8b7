"""How good the advice is: the ends of recorded runs hidden, and forecast.

    python benchmarks/advice.py                                the tables of docs/advice.md, half a minute
    python benchmarks/advice.py --record FOLDER... --as NAME   adds the runs in these folders

The recorded runs (`benchmarks/advice_runs.json`) are real: losses of small models on the built-in corpus,
from scratch and grown, and of the small model trained on to the FLOPs of a growth. For each growth, the small
model's curve is known up to the growth, the target's from scratch up to a share; the ends of the grown run
and of the small model trained on are hidden. The last lines are the constants of `megatron_nexus/advice`
(G, kappa), measured on these same runs.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nexus.advice.curve import Curve, GrownFrom, Point, Schedule, Size
from megatron_nexus.advice.forecast import Interval, Plan, measured_kept
from megatron_nexus.advice.loss_law import LEAST_POINTS, fit_law
from megatron_nexus.advice.phase import Phase, Position
from megatron_nexus.advice.report import Advice, report_lines
from megatron_nexus.advice.run_curve import read_run
from megatron_nexus.advice.target import TargetAdvice, advise
from megatron_nexus.advice.verdict import Answer
from megatron_nexus.checkpoint.location import location
from megatron_nexus.errors import NexusError

RECORDED = Path(__file__).with_name("advice_runs.json")
SHARES = {"25 %": 0.25, "50 %": 0.5, "100 %": 1.0, "pilots": 0.0}
"""Of the target's run from scratch that is known; or all that was run with half of the FLOPs."""
SHOWN = (("long/long1-g2000-tD", "50 %"), ("tiny/s1-g500-tMA", "100 %"), ("depth/s1-g713-2076", "pilots"))
STABLE = Position(Phase.STABLE, "WSD")
HELD_OUT = "held"
"""The experiment that was recorded after all constants were chosen, and had no part in any."""
NEAR = 0.03
"""Two budgets that differ by less are one."""


@dataclass(frozen=True)
class Recorded:
    """A recorded run: of which experiment and seed, and its curve."""

    experiment: str
    seed: int
    curve: Curve

    @property
    def flops(self) -> float:
        """Of the whole run, its base included."""
        c = self.curve
        base = c.grown.tokens if c.grown else 0.0
        before = base * c.grown.base.flops_per_token if c.grown else 0.0
        return before + (c.last.tokens - base) * c.size.flops_per_token

    @property
    def is_decayed(self) -> bool:
        """Whether it ended at a low learning rate."""
        return self.curve.last.rate < 0.5


def to_json(run: Recorded) -> dict[str, object]:
    """A run as the file has it, losses to 1e-4."""
    c = run.curve
    made: dict[str, object] = {"experiment": run.experiment, "seed": run.seed, "name": c.name}
    made["size"] = [c.size.name, c.size.parameters, c.size.flops_per_token]
    if c.grown:
        base = c.grown.base
        made["grown"] = [c.grown.tokens, c.grown.area, base.parameters, base.flops_per_token]
    made["points"] = [[int(p.tokens), int(p.area), round(p.rate, 3), round(p.loss, 4)] for p in c.points]
    return made


def load(path: Path = RECORDED) -> list[Recorded]:
    """The recorded runs."""
    runs = []
    for raw in json.loads(path.read_text()):
        grown = None
        if "grown" in raw:
            tokens, area, parameters, flops = raw["grown"]
            grown = GrownFrom(tokens, area, tokens * flops, Size("base", parameters, flops))
        points = tuple(Point(*map(float, point)) for point in raw["points"])
        runs.append(
            Recorded(raw["experiment"], raw["seed"], Curve(raw["name"], Size(*raw["size"]), points, grown))
        )
    return runs


def record(folders: Sequence[Path], experiment: str) -> None:
    """Add the finished runs in `folders` to the file."""
    kept = [run for run in load() if run.experiment != experiment] if RECORDED.exists() else []
    for folder in folders:
        try:
            read = read_run(location(str(folder)))
        except NexusError as error:
            print(f"left out: {error}")
            continue
        if read.saved.manifest.progress.step < read.saved.config.training.train_iters:
            print(f"left out: {folder} is not finished")
            continue
        c = read.curve
        curve = Curve(
            f"{experiment}/{folder.name}",
            Size(folder.name, c.size.parameters, c.size.flops_per_token),
            c.points,
            c.grown,
        )
        kept.append(Recorded(experiment, read.saved.config.training.seed, curve))
    RECORDED.write_text("[\n" + ",\n".join(json.dumps(to_json(run)) for run in kept) + "\n]\n")
    print(f"{len(kept)} runs, {RECORDED.stat().st_size:,} bytes")


@dataclass(frozen=True)
class Forecasts:
    """Forecast intervals and the measured values."""

    pairs: list[tuple[Interval, float]]

    def row(self) -> str:
        """Number, coverage of the 95 % intervals, mean half width, mean and root mean square error."""
        inside = sum(i.low <= truth <= i.high for i, truth in self.pairs)
        errors = [i.estimate - truth for i, truth in self.pairs]
        half = statistics.mean((i.high - i.low) / 2 for i, _ in self.pairs)
        n = len(self.pairs)
        rms = float(np.sqrt(np.mean(np.square(errors))))
        mean = statistics.mean(errors)
        return f"{n} | {inside} ({100 * inside / n:.0f} %) | {half:.3f} | {mean:+.3f} | {rms:.3f}"


def ends(runs: Sequence[Recorded]) -> Iterator[tuple[float, Forecasts]]:
    """Forecast the last loss of each run from scratch that has decayed, from its first 30, 50 and 70 %."""
    whole = [run.curve for run in runs if run.is_decayed and run.curve.grown is None]
    for share in (0.3, 0.5, 0.7):
        pairs = []
        for curve in whole:
            seen = curve.until(share * curve.last.tokens)
            if len(seen.fitted) >= LEAST_POINTS:
                law = fit_law([seen], 1, 0)
                pairs.append((Interval.of(law.loss(curve.last.area, curve.last.rate)), curve.last.loss))
        yield share, Forecasts(pairs)


@dataclass(frozen=True)
class Case:
    """A recorded growth with what is needed to score advice on it; losses of the two ends."""

    grown: Recorded
    base: Curve
    scratch: Curve
    trained_on: float
    scratch_at: float | None

    @property
    def gain(self) -> float:
        """By how much the growth ended below the small model trained on, at equal FLOPs."""
        return self.trained_on - self.grown.curve.last.loss


def same(one: Size, other: Size) -> bool:
    return (one.parameters, one.flops_per_token) == (other.parameters, other.flops_per_token)


def interpolated(runs: Sequence[Recorded], flops: float) -> float | None:
    """The loss of decayed runs of one size at `flops`, linear in log FLOPs; None beyond them."""
    known = sorted((run.flops, run.curve.last.loss) for run in runs if run.is_decayed)
    x = np.log([f for f, _ in known])
    if len(x) == 0 or not x[0] - NEAR <= np.log(flops) <= x[-1] + NEAR:
        return None
    return float(np.interp(np.log(flops), x, [loss for _, loss in known]))


def cases(runs: Sequence[Recorded]) -> list[Case]:
    """The growths whose alternatives were run, too."""
    found = []
    for grown in runs:
        start = grown.curve.grown
        if start is None or not grown.is_decayed:
            continue
        of_seed = [
            r for r in runs if (r.experiment, r.seed) == (grown.experiment, grown.seed) and not r.curve.grown
        ]
        small = [r for r in of_seed if same(r.curve.size, start.base)]
        large = [r for r in of_seed if same(r.curve.size, grown.curve.size)]
        trained_on = interpolated(small, grown.flops)
        bases = [c.until(start.tokens) for r in small if (c := r.curve).last.tokens >= start.tokens]
        bases = [c for c in bases if len(c.fitted) >= LEAST_POINTS and c.last.rate > 0.99]
        if trained_on is not None and bases and large:
            scratch = max(large, key=lambda r: r.curve.last.tokens).curve
            found.append(Case(grown, bases[0], scratch, trained_on, interpolated(large, grown.flops)))
    return found


def half_known(case: Case, runs: Sequence[Recorded]) -> list[Curve]:
    """What was run to the end with at most half of the growth's FLOPs, growths among it."""
    return [
        run.curve
        for run in runs
        if (run.experiment, run.seed) == (case.grown.experiment, case.grown.seed)
        if run.is_decayed and run.flops <= (0.5 + NEAR) * case.grown.flops
    ]


def advice_by_pilots(case: Case, pilots: Sequence[Curve]) -> TargetAdvice:
    """The advice at the moment of the growth, with other runs to learn from."""
    plan = Plan(case.grown.flops, Schedule(0.2, 0.1), case.base.last)
    return advise(case.base, {"target": case.grown.curve.size}, pilots, plan, STABLE, "", 1)[0]


def known(case: Case, what: str, runs: Sequence[Recorded]) -> list[Curve]:
    """What is known in addition to the small model's curve up to the growth."""
    if what == "pilots":
        return half_known(case, runs)
    return [case.scratch.until(SHARES[what] * case.scratch.last.tokens)]


def show(case: Case, advice: TargetAdvice) -> None:
    """The advice as `nexus advise` words it, and what came out."""
    plan = Plan(case.grown.flops, Schedule(0.2, 0.1), case.base.last)
    advised = Advice(case.grown.curve.name, case.base.size, plan, STABLE, (advice,), ())
    print("\n```text")
    for line in report_lines(advised, {}, None):
        print(line)
    print(
        f"came out: small trained on {case.trained_on:.3f}, grown {case.grown.curve.last.loss:.3f}, "
        f"which is {case.gain:+.3f} below"
    )
    print("```")


def kappas(found: Sequence[Case], runs: Sequence[Recorded]) -> Iterator[tuple[Case, Interval]]:
    """Measure kappa of each growth with everything visible."""
    for case in found:
        start = case.grown.curve.grown
        assert start is not None
        small = [
            r.curve
            for r in runs
            if (r.experiment, r.seed) == (case.grown.experiment, case.grown.seed)
            if r.curve.grown is None and same(r.curve.size, start.base)
        ]
        kept = measured_kept(case.grown.curve, fit_law(small, 1, 0), fit_law([case.scratch], 1, 1))
        assert kept is not None
        yield case, Interval.of(kept)


HEAD = "n | inside the 95 % interval | half width | mean error | r.m.s. error |"


def tell_forecasts(title: str, found: Sequence[Case], runs: Sequence[Recorded]) -> None:
    """The forecast and the result of each growth, and how often the answers were right."""
    print(f"\n| {title}; what is known of the target | {HEAD}\n|---|---:|---:|---:|---:|---:|")
    answers: dict[tuple[str, Answer], list[Case]] = {}
    for share in SHARES:
        rows: dict[str, list[tuple[Interval, float]]] = {}
        for case in found:
            advice = advice_by_pilots(case, known(case, share, runs))
            if (f := advice.forecast) is None:
                continue
            rows.setdefault("loss of the small one trained on", []).append((f.trained_on, case.trained_on))
            rows.setdefault("loss of the grown one", []).append((f.grown, case.grown.curve.last.loss))
            rows.setdefault("difference, what growth gains", []).append((f.gain, case.gain))
            if case.scratch_at is not None:
                rows.setdefault("loss of the target from scratch", []).append((f.scratch, case.scratch_at))
            answers.setdefault((share, advice.verdict.answer), []).append(case)
        for what, pairs in rows.items():
            print(f"| {share}: {what} | {Forecasts(pairs).row()} |")
    print("\n| known of the target | answer | growths | gained | lost |\n|---|---|---:|---:|---:|")
    for (share, answer), cases in answers.items():
        better = sum(case.gain > 0 for case in cases)
        print(f"| {share} | {answer} | {len(cases)} | {better} | {len(cases) - better} |")


def tell_growths(found: Sequence[Case], runs: Sequence[Recorded]) -> None:
    """What each growth gained, and the constants that follow from all runs."""
    print("\n| growth | seed | small trained on | grown | gain | kappa |\n|---|---:|---:|---:|---:|---:|")
    middle = []
    for case, kept in kappas(found, runs):
        middle.append(kept.estimate)
        ended, name = case.grown.curve.last.loss, case.grown.curve.name
        row = f"{case.grown.seed} | {case.trained_on:.3f} | {ended:.3f} | {case.gain:+.3f} | {kept}"
        print(f"| {name} | {row} |")
    print(f"\nkappa: mean {statistics.mean(middle):.2f}, deviation {statistics.stdev(middle):.2f}")
    whole = [r.curve for r in runs if r.is_decayed and not r.curve.grown]
    gains = [float(np.median(fit_law([curve], 1, 0).gain)) for curve in whole]
    print(f"G: mean {statistics.mean(gains):.3f}, deviation {statistics.stdev(gains):.3f}, {len(gains)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", type=Path, nargs="+", metavar="FOLDER", help="of runs, to be added")
    parser.add_argument("--as", dest="experiment", default="", help="the experiment that they are of")
    given = parser.parse_args()
    if given.record:
        record(given.record, given.experiment)
        return
    runs = load()
    found = cases(runs)
    print(f"{len(runs)} recorded runs, {sum(len(r.curve.points) for r in runs):,} losses\n")
    print(f"| last loss of a run, known | {HEAD}\n|---|---:|---:|---:|---:|---:|")
    for title, some in (
        ("", [run for run in runs if run.experiment != HELD_OUT]),
        (", held out", [run for run in runs if run.experiment == HELD_OUT]),
    ):
        for share, forecasts in ends(some):
            print(f"| {100 * share:.0f} % of it{title} | {forecasts.row()} |")
    held = [case for case in found if case.grown.experiment == HELD_OUT]
    tell_forecasts("growths", [case for case in found if case not in held], runs)
    tell_forecasts("growths held out", held, runs)
    tell_growths(found, runs)
    for name, what in SHOWN:
        case = next(case for case in found if case.grown.curve.name == name)
        show(case, advice_by_pilots(case, known(case, what, runs)))


if __name__ == "__main__":
    main()

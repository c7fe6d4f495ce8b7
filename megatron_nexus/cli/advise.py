"""The verb `advise`: grow a run now, later, never, or cannot tell; how far, and what it saves."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nexus import log
from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.run_dir import complete_checkpoints, find_checkpoint
from megatron_nexus.checkpoint.saved_run import SavedRun
from megatron_nexus.cli.arguments import count, given_twice, positive
from megatron_nexus.cli.next_command import train_command
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.run_config import RunConfig, TrainingConfig
from megatron_nexus.errors import ConfigError, raise_problems
from megatron_nexus.extras import missing_packages
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.growth.request import GrowthRequest, grown_config, read_request
from megatron_nexus.growth.settings import GrowthConfig

if TYPE_CHECKING:
    from megatron_nexus.advice.forecast import Plan
    from megatron_nexus.advice.probe import Probed
    from megatron_nexus.advice.run_curve import RunCurve
    from megatron_nexus.advice.target import TargetAdvice

AXES = (
    ("num_layers",),
    ("hidden_size",),
    ("nexus_m", "nexus_a"),
    ("ffn_hidden_size",),
    ("ffn_nexus_m",),
    ("pattention_slots",),
)
"""What is considered without --target-sizes, each doubled: widths that belong together, together."""
PILOT_SHARE = 0.5
"""Share of the tokens at which the growth would end, for a pilot; with less, intervals held 0 too often."""


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "advise",
        "RUN [flags]",
        description=(
            "Say whether to grow a run now, later or never, or that this is unknown, with the reasons, "
            "and what would be saved, at equal FLOPs with those of the base included."
        ),
    )
    flag = parser.add_flag
    flag("run", "a run's folder, or one checkpoint in it", type=location, metavar="RUN")
    text = 'targets, each as --grow has it, such as "nexus_m=1088 nexus_a=1228" (default: each axis, twice)'
    flag("--target-sizes", text, nargs="+", metavar="SIZES", default=[])
    text = "runs to learn from: targets from scratch, other sizes, growths of RUN, this size with a decay"
    flag("--pilots", text, nargs="+", type=location, metavar="RUN", default=[])
    budget = parser.add_mutually_exclusive_group()
    text = "FLOPs of the whole run, what is spent included (default: those of the steps that RUN is to take)"
    budget.add_argument("--budget-flops", help=text, type=positive(float), metavar="FLOPS")
    text = "hours from now on, at the FLOP/s that RUN had"
    budget.add_argument("--budget-hours", help=text, type=positive(float), metavar="HOURS")
    text = "try every recipe of each target on this checkpoint for K steps, such as 32 (needs scipy)"
    flag("--probe", text, type=positive(int), metavar="K", default=0)
    flag("--probe-seeds", "growths of each recipe (default: 3)", type=positive(int), metavar="N", default=3)
    text = "where they are trained, one at a time, and removed (default: a temporary folder)"
    flag("--probe-folder", text, type=Path, metavar="FOLDER")
    flag("--seed", "of the bootstrap (default: 1234)", type=count, default=1234)
    flag("--json", "print JSON", action="store_true")
    return parser


@dataclass(frozen=True)
class Target:
    """A target as it was asked for."""

    request: GrowthRequest
    config: RunConfig


def run(argv: list[str]) -> None:
    """Run `nexus advise` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    log.configure(is_main_rank=True, stream=sys.stderr if given.json else None)
    if given.probe:
        raise_problems(missing_packages("analysis", "--probe needs"))
    for place in (given.run, *given.pilots):
        find_checkpoint(place)
    from megatron_nexus.advice.phase import position, schedule_of
    from megatron_nexus.advice.report import Advice, report_lines
    from megatron_nexus.advice.run_curve import read_runs, size_of
    from megatron_nexus.advice.target import advise
    from megatron_nexus.advice.verdict import Answer

    recorded, *pilots = read_runs([given.run, *given.pilots])
    saved = recorded.saved
    targets = _targets(saved.config, given.target_sizes)
    if given.pilots and not recorded.validated:
        log.logger.info("training losses are compared: not all of these runs were validated often enough")
    raise_problems(_comparison_problems(recorded, pilots))
    plan = _plan(recorded, given, schedule_of(saved.config))
    here = position(saved)
    length = saved.config.training.seq_length
    sizes = {name: size_of(target.config.model, length, name) for name, target in targets.items()}
    curves = [pilot.curve for pilot in pilots]
    advice = advise(recorded.curve, sizes, curves, plan, here, _elsewhere(recorded), given.seed)
    probed = _probe(saved, targets, given) if given.probe else []
    found = Advice(str(recorded.root), recorded.curve.size, plan, here, tuple(advice), tuple(probed))
    if given.json:
        sys.stdout.write(json.dumps(found.as_json(), indent=1) + "\n")
        return
    pilots_to_run = {
        one.name: _pilot_command(recorded, plan, one, targets[one.name])
        for one in advice
        if one.forecast is None
    }
    answer, name = found.answer
    after = _growth_command(saved, plan, targets[name], found.growth(name)) if answer is Answer.NOW else None
    log.show(report_lines(found, pilots_to_run, after))


def _probe(saved: SavedRun, targets: Mapping[str, Target], given: argparse.Namespace) -> list["Probed"]:
    """Probe the recipes of all targets. Raises what `nexus train` raises."""
    from megatron_nexus import api
    from megatron_nexus.advice.probe import probe
    from megatron_nexus.advice.recipes import recipes
    from megatron_nexus.advice.run_curve import size_of

    wanted = {name: (one.request, recipes(saved, one.request)) for name, one in targets.items()}
    training = saved.config.training
    tokens = given.probe * training.global_batch_size * training.seq_length
    flops = sum(
        given.probe_seeds
        * len(wanted[name][1])
        * size_of(one.config.model, training.seq_length, "").flops_per_token
        for name, one in targets.items()
    )
    runs = 1 + given.probe_seeds * sum(len(found) for _, found in wanted.values())
    log.logger.info("the probe is %d runs of %d steps, %.2g FLOPs", runs, given.probe, flops * tokens)
    parent = given.probe_folder
    if parent is not None and not parent.is_dir():
        raise ConfigError(f"--probe-folder {parent} is not a folder: make it, or give another")
    with tempfile.TemporaryDirectory(prefix="advise-", dir=parent) as folder:
        return probe(
            saved,
            tokenizer_record(saved.manifest),
            wanted,
            given.probe,
            given.probe_seeds,
            Path(folder),
            lambda save, settings: api.train(save, echo=False, **settings),
        )


def _targets(config: RunConfig, texts: Sequence[str]) -> dict[str, Target]:
    """Return the targets by what was asked for. Raises ConfigError with every reason why one cannot be."""
    if texts:
        requests = {text: read_request(text, "--target-sizes") for text in texts}
        return {text: Target(request, grown_config(config, request)) for text, request in requests.items()}
    found = {}
    for names in AXES:
        sizes = {name: 2 * size for name in names if (size := getattr(config.model, name))}
        if not sizes:
            continue
        request = GrowthRequest(sizes, GrowthConfig())
        try:
            found[_text(sizes)] = Target(request, grown_config(config, request))
        except ConfigError:
            continue  # not an axis of this model
    if not found:
        raise ConfigError("no axis of this model can be doubled: give --target-sizes")
    return found


def _text(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def _comparison_problems(run: "RunCurve", pilots: Sequence["RunCurve"]) -> Iterator[str]:
    """Yield what is wrong with curves that are too short, or whose losses are of other tokens."""
    from megatron_nexus.advice.loss_law import LEAST_POINTS

    facts = []
    for one in (run, *pilots):
        if len(one.curve.fitted) < LEAST_POINTS:
            yield (
                f"{one.root} has {len(one.curve.fitted)} losses after its first third, {LEAST_POINTS} are "
                "needed: train it on, or validate more often (--eval-interval)"
            )
        config, tokenizer = one.saved.config, one.saved.manifest.tokenizer_fingerprint[:12]
        sizes = {"--vocab-size": config.model.vocab_size, "--seq-length": config.training.seq_length}
        facts.append({**sizes, "tokenizer": tokenizer})
        for name, its in facts[-1].items():
            if its != facts[0][name]:
                yield (
                    f"--pilots {one.root} has {name} {its}, the run {facts[0][name]}: losses of different "
                    "tokens cannot be compared; leave it out"
                )
    yield from given_twice(str(one.root.resolve()) for one in (run, *pilots))


def _plan(run: "RunCurve", given: argparse.Namespace, schedule: Any) -> "Plan":
    """Return the budget with where the run is. Raises ConfigError where nothing of it is left."""
    from megatron_nexus.advice.forecast import Plan

    cheap, now = run.curve.size.flops_per_token, run.curve.last
    spent = float(run.saved.manifest.progress.flops) or cheap * now.tokens
    if given.budget_hours is not None:
        if run.flops_per_s is None:
            raise ConfigError(f"--budget-hours: {run.root} does not say how fast it was: give --budget-flops")
        flops = spent + 3600.0 * given.budget_hours * run.flops_per_s
    elif given.budget_flops is not None:
        flops = given.budget_flops
        if flops <= spent:
            raise ConfigError(
                f"--budget-flops {flops:.3g} is of the whole run, which has spent {spent:.3g}: give more"
            )
    else:
        training = run.saved.config.training
        left = training.train_iters - run.saved.manifest.progress.step
        more = left * training.global_batch_size * training.seq_length * cheap
        flops = spent + more if more > 0 else 2.0 * spent  # a finished run has nothing left: as much again
    grown = run.curve.grown
    return Plan(flops, schedule, now, cheap * grown.tokens - grown.flops if grown else 0.0)


def _elsewhere(run: "RunCurve") -> str:
    """Return from where to grow in place of a checkpoint whose learning rate has fallen."""
    from megatron_nexus.advice.phase import Phase, position_of

    per_step = run.saved.config.training.global_batch_size
    stable = [
        folder
        for step, folder in complete_checkpoints(run.root).items()
        if position_of(run.saved.config, step, step * per_step).phase is Phase.STABLE
    ]
    if stable:
        return f"{stable[-1]} is the newest checkpoint of that phase"
    return "no checkpoint of that phase is left; keep some of the next run (--save-interval)"


def _steps(training: TrainingConfig, tokens: float) -> int:
    return max(1, round(tokens / (training.global_batch_size * training.seq_length)))


def _pilot_command(run: "RunCurve", plan: "Plan", one: "TargetAdvice", target: Target) -> str:
    """Return the command of a pilot that would tell what the target reaches, and its cost."""
    training = run.saved.config.training
    steps = _steps(training, PILOT_SHARE * (plan.now.tokens + plan.tokens_left(run.curve.size, one.size)))
    cost = steps * training.global_batch_size * training.seq_length
    sizes = [word for name, size in target.request.sizes.items() for word in (flag_of(name), str(size))]
    text = train_command(
        "--config",
        str(run.root / "config.yaml"),
        *sizes,
        *_wsd_flags(steps, 0.2),
        *("--eval-interval", str(max(1, steps // 40))),
        *("--save", f"runs/pilot-{one.name.replace(' ', '-').replace('=', '-')}"),
    )
    return f"pilot, {cost * one.size.flops_per_token:.2g} FLOPs; then give it as --pilots: {text}"


def _wsd_flags(steps: int, decay: float) -> list[str]:
    flags = ["--train-iters", str(steps), "--lr-decay-style", "WSD"]
    return [*flags, "--lr-wsd-decay-iters", str(max(1, round(decay * steps)))]


def _growth_command(saved: SavedRun, plan: "Plan", target: Target, growth: str | None) -> str:
    from megatron_nexus.advice.run_curve import size_of

    config = saved.config
    dear = size_of(target.config.model, config.training.seq_length, "target").flops_per_token
    left = plan.flops - saved.manifest.progress.flops
    steps = saved.manifest.progress.step + _steps(config.training, left / dear)
    return train_command(
        "--load",
        str(saved.checkpoint),
        "--grow",
        growth or _text(target.request.sizes),
        *_wsd_flags(steps, plan.schedule.decay),
        *("--save", f"{saved.checkpoint.parent}-grown"),
    )

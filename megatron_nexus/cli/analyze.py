"""The verb `analyze`: the growth dynamics of the Nexusformer paper, from the checkpoints of grown runs."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nexus import log
from megatron_nexus.base.durable import atomic_file
from megatron_nexus.base.invocation import command
from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.run_dir import complete_checkpoints, find_checkpoint
from megatron_nexus.checkpoint.saved_run import saved_config
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.cli.arguments import count, given_twice, output_problems, positive
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.errors import ConfigError, raise_problems
from megatron_nexus.extras import missing_packages
from megatron_nexus.growth.settings import CHANGING
from megatron_nexus.training.metrics import run_metrics, task_averages, validation_curves

if TYPE_CHECKING:
    from megatron_nexus.analysis.path import Path as GrowthPath
    from megatron_nexus.analysis.samples import Group

TASKS, VALIDATION = "tasks", "validation"
FORMATS = (".png", ".svg", ".pdf")


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "analyze",
        "RUN... [flags]",
        description="Measure how the weights that a growth added part from the older ones, by checkpoint.",
    )
    flag = parser.add_flag
    flag("runs", "folders of grown runs", type=location, nargs="+", metavar="RUN")
    flag("--growth", "of a chain, from 1 on (default: each run's newest)", type=positive(int), metavar="N")
    text = "base weights against those that the growth added, or against all of the enlarged matrix"
    flag("--compare-with", f"{text} (default: grown)", choices=("grown", "whole"), default="grown")
    text = "weights of each side of each group, drawn without replacement (default: 20000)"
    flag("--samples", text, type=positive(int), default=20_000, metavar="N")
    flag("--seed", "of samples and null models (default: 1234)", type=count, default=1234)
    text = "layers with commas between them, from 0 on (default: all)"
    flag("--layers", text, type=layers, metavar="LIST")
    text = "what d3 is of: tasks (mean accuracy), or a validation set by its name in the metrics"
    flag("--performance", f"{text} (default: tasks if there are any, else the first set)", metavar="NAME")
    flag("--output", "write every number there as JSON, too", type=Path, metavar="FILE")
    flag("--plot", "draw U, NOC, R and d3 there, such as growth.png", type=Path, metavar="FILE")
    return parser


def layers(text: str) -> frozenset[int]:
    """Return the numbers of layers in a list such as 0,3. Raises ValueError."""
    return frozenset(count(part) for part in text.split(","))


def run(argv: list[str]) -> None:
    """Run `nexus analyze` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    log.configure(is_main_rank=True)
    _look_ahead(given)
    runs = [_open_run(root, given) for root in given.runs]
    from megatron_nexus.analysis.picture import draw_paths
    from megatron_nexus.analysis.report import make_report, report_json, report_lines
    from megatron_nexus.analysis.samples import ALL

    total = sum(len(run.checkpoints) for run in runs)
    with log.Progress("reading samples of weights", total, "checkpoints") as progress:
        paths = [path for run in runs for path in _measure(run, given, progress)]
    for run in runs:
        log.logger.info("%s: %s", run.name, run.description)
    log.logger.info("samples of at most %s weights of each side, seed %d", f"{given.samples:,}", given.seed)
    with log.Progress("fitting", after_s=2.0):
        reports = make_report(paths, given.seed)
    log.show(report_lines(reports))
    if given.output is not None:
        settings = {name: getattr(given, name) for name in ("compare_with", "samples", "seed")}
        found = {
            "settings": settings,
            "runs": [{"run": run.name, "growth": run.growth, "performance": run.performance} for run in runs],
            "groups": report_json(reports),
        }
        with atomic_file(given.output) as write:
            write((json.dumps(found, indent=1) + "\n").encode())
        log.logger.info("wrote %s", given.output)
    if given.plot is not None:
        draw_paths([path for path in paths if path.group == ALL], given.plot)
        log.logger.info("picture: %s", given.plot)


def _look_ahead(given: argparse.Namespace) -> None:
    """Raise ConfigError for what can be wrong before anything is read."""
    problems = missing_packages("analysis", f"{command('analyze')} needs")
    problems += given_twice(map(str, given.runs))
    problems += [*output_problems("--output", given.output), *output_problems("--plot", given.plot)]
    if given.plot is not None and given.plot.suffix.lower() not in FORMATS:
        endings = ", ".join(FORMATS)
        problems.append(f"--plot {given.plot} must end in one of {endings}: give such as growth.png")
    raise_problems(problems)


@dataclass(frozen=True)
class _Run:
    """A run to be measured: its checkpoints since a growth, its groups, losses and performance by step."""

    name: str
    growth: Mapping[str, Any]
    checkpoints: Mapping[int, Location]
    groups: Sequence["Group"]
    losses: Mapping[int, float]
    performance: str
    performances: Mapping[int, float]

    @property
    def description(self) -> str:
        """What grew, when, and what d3 is of."""
        sizes = ", ".join(f"{name} {old:,} -> {new:,}" for name, (old, new) in self.growth["axes"].items())
        init = self.growth["settings"].get("init", "unknown")
        measure = f"the mean accuracy of {TASKS}" if self.performance == TASKS else f"{self.performance} loss"
        return f"{sizes} (--init {init}) at step {self.growth['step']:,}; d3 is of {measure}"


def _open_run(root: Location, given: argparse.Namespace) -> _Run:
    """Find a run's checkpoints since the growth that is asked for. Raises ConfigError, CheckpointError."""
    checkpoints = complete_checkpoints(root)
    names = {folder.name for folder in checkpoints.values()}
    if not checkpoints:
        found = find_checkpoint(root).resolve()
        raise ConfigError(f"{root} is one checkpoint: give the folder of its run, {found.parent}")
    if left_out := sorted({path.name for path in root.iterdir() if path.name.startswith("iter_")} - names):
        log.logger.info("%s: left out, as they are not whole: %s", root, ", ".join(left_out))
    from megatron_nexus.analysis.samples import make_groups
    from megatron_nexus.growth.generations import boxes_by_growth, growths_of

    manifests = {step: read_manifest(folder) for step, folder in checkpoints.items()}
    step, newest = max(manifests.items())
    growths = growths_of(newest.lineage)
    number = given.growth or len(growths)
    if not growths:
        raise ConfigError(f"{root} has never grown, there are no new weights: see {command('grow')} --help")
    if number > len(growths):
        raise ConfigError(f"--growth {number}: {root} has grown {len(growths)} times: give at most that")
    model = saved_config(checkpoints[step], newest).model
    if given.layers is not None and max(given.layers) >= model.num_layers:
        held = f"{root} has layers 0 to {model.num_layers - 1}"
        raise ConfigError(f"--layers {max(given.layers)}: {held}: give some of these")
    boxes = boxes_by_growth(model, newest.lineage)
    groups = make_groups(newest.specs, boxes, number, given.compare_with == "whole", given.layers)
    groups = [group for group in groups if group.base and group.grown]
    if not groups:
        axes = ", ".join(growths[number - 1]["axes"])
        problem = f"growth {number} ({axes}) left no matrix with both base and new weights"
        raise ConfigError(f"{root}: {problem}: give another --growth, or another run")
    since = {s: path for s, path in checkpoints.items() if len(growths_of(manifests[s].lineage)) >= number}
    growth = growths[number - 1]
    records = run_metrics(root)
    if growth["settings"].get("init") not in CHANGING and growth.get("parent"):
        # The model computed the same before it grew: what its parent reached at that step is its own.
        before = run_metrics(location(growth["parent"]).parent)
        records = [r for r in before if r["step"] == growth["step"]] + records
    losses, name, performances = _performance(root, records, given.performance)
    return _Run(str(root), growth, since, groups, losses, name, performances)


def _performance(
    root: Location, records: list[dict[str, Any]], asked: str | None
) -> tuple[dict[int, float], str, dict[int, float]]:
    """Return validation losses by step, what performance is, and it by step, the larger the better."""
    curves, accuracies = validation_curves(records), dict(task_averages(records))
    names = [*([TASKS] if accuracies else []), *curves]
    held_out = next((name for name in curves if name.startswith(VALIDATION)), VALIDATION)
    name = asked or (TASKS if accuracies else held_out)
    if asked is not None and asked not in names:
        known = f"the metrics of {root} have {', '.join(names) or 'none'}"
        raise ConfigError(f"--performance {asked}: {known}: give one of these, or drop the flag")
    losses = dict(curves.get(held_out if name == TASKS else name, []))
    if name == TASKS:
        return losses, name, accuracies
    return losses, name, {step: -loss for step, loss in losses.items()}


def _measure(run: _Run, given: argparse.Namespace, progress: log.Progress) -> list["GrowthPath"]:
    """Compare the samples of each group at each checkpoint of a run. Raises CheckpointError."""
    from megatron_nexus.analysis.path import Snapshot, make_path
    from megatron_nexus.analysis.samples import read_samples
    from megatron_nexus.analysis.two_samples import compare

    snapshots: dict[str, list[Snapshot]] = {group.name: [] for group in run.groups}
    for step, folder in run.checkpoints.items():
        reader = CheckpointReader(folder)
        tokens = reader.manifest.progress.tokens
        for name, sample in read_samples(reader, run.groups, given.samples, given.seed).items():
            compared = compare(sample.base, sample.grown)
            loss, performance = run.losses.get(step), run.performances.get(step)
            snapshots[name].append(Snapshot(step, tokens, compared, loss, performance))
        progress.advance(1)
    return [make_path(run.name, name, found) for name, found in snapshots.items()]

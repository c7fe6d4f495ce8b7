"""Several runs compared: their losses in one picture and one table, read from their metrics.

Made for runs that begin where another ended: one that was grown, moved to another topology, or given another
schedule. Runs that begin from the same checkpoint read the same samples, so that their first losses are
those of one batch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_nexus.errors import ConfigError, raise_problems
from megatron_nexus.training.metrics import (
    METRICS_FILE,
    Curve,
    read_metrics,
    training_curve,
    validation_curves,
)


@dataclass(frozen=True)
class RunCurves:
    """The losses of a run: of its steps, and of each of its validation sets by name."""

    name: str
    training: Curve
    validations: dict[str, Curve]


def read_runs(folders: Sequence[Path]) -> list[RunCurves]:
    """The curves of the runs in `folders`, each called by the last parts of its path that tell it apart.

    Raises ConfigError: a folder has no metrics, or none of a step.
    """
    runs, problems = [], []
    for folder, name in zip(folders, run_names(folders), strict=True):
        records = read_metrics(folder / METRICS_FILE)
        if not (folder / METRICS_FILE).is_file():
            problems.append(f"{folder} has no {METRICS_FILE}: give the folder of a run")
        elif not training_curve(records):
            problems.append(f"{folder / METRICS_FILE} has no step: give a run that has trained")
        runs.append(RunCurves(name, training_curve(records), validation_curves(records)))
    raise_problems(problems)
    return runs


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the folders of runs among `folders` and below them, in order.

    Raises ConfigError: one is not a run and holds none, or a run is given twice.
    """
    found: list[Path] = []
    problems = []
    for folder in folders:
        runs = [folder] if (folder / METRICS_FILE).is_file() else []
        runs += sorted(path.parent for path in folder.glob(f"*/**/{METRICS_FILE}")) if folder.is_dir() else []
        if not runs:
            what = "has no" if folder.is_dir() else "is not a folder and has no"
            problems.append(
                f"{folder} {what} {METRICS_FILE}, and no folder below it has one: give a run's folder (what "
                "--save named), or a folder of runs"
            )
        found += runs
    raise_problems(problems)
    resolved = [run.resolve() for run in found]
    if twice := sorted({str(run) for run in found if resolved.count(run.resolve()) > 1}):
        raise ConfigError(f"{', '.join(twice)}: given twice, or with a folder around it: give each run once")
    return found


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of each path that tell it apart. Raises ConfigError: one is given twice."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError("a run is given twice: give each folder once")
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def comparison_table(runs: Sequence[RunCurves]) -> Iterator[str]:
    """Yield the lines of a table in Markdown: first and last losses of each run, its last validation."""
    yield "| run | steps | first loss | second | last loss | validation at its end |"
    yield "|---|---|---:|---:|---:|---:|"
    for run in runs:
        steps, losses = zip(*run.training, strict=True)
        second = f"{losses[1]:.6f}" if len(losses) > 1 else ""
        ends = [f"{curve[-1][1]:.4f}" for curve in run.validations.values()]
        yield (
            f"| {run.name} | {steps[0]:,} to {steps[-1]:,} | {losses[0]:.6f} | {second} | {losses[-1]:.6f} "
            f"| {', '.join(ends) or 'none'} |"
        )


def plot_runs(runs: Sequence[RunCurves], path: Path, title: str) -> None:
    """Draw the losses of the runs in one picture: steps as lines, validations as dots of the same colour.

    Below them, where runs begin at the same step, how far each lies from the first of these.

    Raises ConfigError where the file cannot be written.
    """
    if path.is_dir() or not path.suffix:  # matplotlib would choose an ending of its own
        raise ConfigError(f"--output {path} names no kind of picture: give a file such as losses.png")
    import matplotlib  # here: half a second that the table does not need

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Later runs are thinner and dashed: of runs with equal losses each can be seen.
    lines = {
        run.name: {
            "color": f"C{index % 10}",
            "linewidth": max(1.0, 2.2 - 0.4 * index),
            "linestyle": ("-", "--", "-.", ":")[min(index, 3)],
        }
        for index, run in enumerate(runs)
    }
    apart = list(_differences(runs))
    figure, panels = pyplot.subplots(
        1 + bool(apart),
        figsize=(8, 6 if apart else 4.5),
        dpi=120,
        layout="constrained",
        sharex=True,
        squeeze=False,
        height_ratios=[2, 1][: 1 + bool(apart)],
    )
    axes = panels[0, 0]
    begins = Counter(run.training[0][0] for run in runs)
    for run in runs:
        axes.plot(*zip(*run.training, strict=True), label=run.name, **lines[run.name])
        for curve in run.validations.values():
            colour = lines[run.name]["color"]
            axes.plot(*zip(*curve, strict=True), "o", markersize=6, color=colour, markeredgecolor="white")
    axes.set(ylabel="loss, nats per token; dots: validation", title=title)
    axes.legend()
    for name, curve in apart:
        panels[1, 0].plot(*zip(*curve, strict=True), label=name, **lines[name])
    if apart:
        first = next(run.name for run in runs if run.training[0][0] == apart[0][1][0][0])
        alike = sum(count > 1 for count in begins.values())
        panels[1, 0].set(ylabel=f"difference to\n{first if alike == 1 else 'the first alike'}")
    for panel in panels[:, 0]:
        panel.grid(alpha=0.3)
        for step in sorted(begins)[1:]:
            panel.axvline(step - 0.5, linestyle=":", color="grey", linewidth=1)
    panels[-1, 0].set_xlabel("optimizer step")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that is not a format of pictures
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--output {path}: {reason}: give a file such as losses.png") from error
    finally:
        pyplot.close(figure)


def _differences(runs: Sequence[RunCurves]) -> Iterator[tuple[str, Curve]]:
    """How far the losses of runs lie from those of the first run that begins at the same step, by name."""
    firsts: dict[int, RunCurves] = {}
    for run in runs:
        first = firsts.setdefault(run.training[0][0], run)
        if run is not first:
            losses = dict(first.training)
            yield run.name, [(step, loss - losses[step]) for step, loss in run.training if step in losses]

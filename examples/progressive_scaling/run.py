"""Train every cell of an experiment with `nexus train`, and keep what they reach.

    python examples/progressive_scaling/run.py examples/progressive_scaling/laptop.yaml runs/scaling
    python examples/progressive_scaling/report.py examples/progressive_scaling/laptop.yaml runs/scaling

A cell that is finished is not run again: after an interruption, or with more schedules, seeds or budgets in
the file, give the same command. `--list` shows the cells and what they cost; `--part 3/8` runs those of the
third of eight jobs, which share no cell.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cells import Cell, Leaf, leaves
from experiment import TERA, Experiment, read_experiment
from warm_runs import train_warm

from megatron_nexus.checkpoint.manifest import MANIFEST_FILE
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.errors import EXIT_CODE_USER_ERROR, ConfigError, NexusError, path_errors
from megatron_nexus.parallel.devices import device_files
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics, validation_curves

RESULT_FILE = "result.json"
SECONDS_FILE = "seconds"


def all_leaves(experiment: Experiment, folder: Path, only: Sequence[str] = ()) -> list[Leaf]:
    """Return the ends of all schedules whose name contains one of `only`, in the file's order.

    Raises ConfigError for a word of `only` that no name contains.
    """
    for part in only:
        if not any(part in schedule.name for schedule in experiment.schedules):
            names = ", ".join(schedule.name for schedule in experiment.schedules)
            raise ConfigError(
                f"--only {part}: no schedule has that in its name: give a part of one of {names}"
            )
    return [
        leaf
        for schedule in experiment.schedules
        if not only or any(part in schedule.name for part in only)
        for seed in schedule.seeds
        for leaf in leaves(experiment, schedule, seed, folder)
    ]


def part_of(found: Sequence[Leaf], part: str) -> list[Leaf]:
    """Return the leaves of part "i/n": those that go back to one run from scratch lie in one part."""
    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--part {part} must be such as 3/8: the third of eight jobs")
    roots = list(dict.fromkeys(leaf.cell.root().folder.parent for leaf in found))
    mine = set(roots[int(index) - 1 :: int(count)])
    return [leaf for leaf in found if leaf.cell.root().folder.parent in mine]


def is_complete(cell: Cell) -> bool:
    """Return whether a cell's checkpoint is there; it gets its name when it is complete."""
    return (cell.checkpoint / MANIFEST_FILE).exists()


def train(cell: Cell) -> None:
    """Run a cell unless it is complete, after the cells that it starts from."""
    if is_complete(cell):
        return
    start, grow = _start(cell)
    words = [*cell.words, "--train-iters", str(cell.last_step), "--save", str(cell.folder)]
    words += ["--load", str(start)] if start else []
    words += ["--grow", grow] if grow else []
    cell.folder.mkdir(parents=True, exist_ok=True)
    log = cell.folder / "train.log"
    began = time.perf_counter()
    if device_files():
        command = [sys.executable, "-m", "megatron_nexus", "train", *words]
        code = _train_cold(command, log)
    else:
        code = train_warm(words, log)
    if code or not is_complete(cell):
        last = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-20:])
        raise ConfigError(f"nexus train {' '.join(words)}\nended with exit code {code}, see {log}:\n{last}")
    with (cell.folder / SECONDS_FILE).open("a") as file:
        file.write(f"{time.perf_counter() - began:.1f}\n")


def _train_cold(command: Sequence[str], log: Path) -> int:
    """Run a command, its output in `log`; where this process is to end, it saves and ends before."""
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _start(cell: Cell) -> tuple[Path | None, str]:
    """Return the checkpoint that a cell starts from, and what --grow is to do with it."""
    if (cell.folder / "latest").exists():  # it was interrupted
        return cell.folder, ""
    earlier = []  # shorter runs of the same trunk
    for folder in cell.folder.parent.glob("to-*"):
        step = int(folder.name.removeprefix("to-"))
        checkpoint = folder / f"iter_{step:07d}"
        if step < cell.last_step and (checkpoint / MANIFEST_FILE).exists():
            earlier.append((step, checkpoint))
    if earlier and cell.folder.name.startswith("to-"):
        return max(earlier)[1], ""
    if cell.parent is None:
        return None, ""
    train(cell.parent)
    return cell.parent.checkpoint, cell.grow


def measure(leaf: Leaf) -> dict[str, object]:
    """Return the record of a leaf, which is trained unless its record is there."""
    path = leaf.cell.folder / RESULT_FILE
    if not path.exists():
        train(leaf.cell)
        losses = validation_curves(read_metrics(leaf.cell.folder / METRICS_FILE))["validation"]
        progress = open_saved_run(leaf.cell.checkpoint).manifest.progress
        record = {
            "schedule": leaf.schedule.name,
            "seed": leaf.seed,
            "loss": dict(losses)[leaf.cell.last_step],
            "steps": progress.step,
            "tokens": progress.tokens,
            "flops": progress.flops,
            "growth_steps": list(leaf.growth_steps),
            "stages": [asdict(stage) for stage in leaf.schedule.stages],
            "trunk": str(leaf.cell.folder.parent.name),
        }
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(record) + "\n")
        draft.replace(path)
    record = json.loads(path.read_text())
    return {**record, "schedule": leaf.schedule.name}


def trunks(found: Sequence[Leaf]) -> list[Cell]:
    """Return every cell of some leaves once."""
    cells: dict[Path, Cell] = {}
    for leaf in found:
        cell: Cell | None = leaf.cell
        while cell is not None:
            cells[cell.folder] = cell
            cell = cell.parent
    return list(cells.values())


def print_list(found: Sequence[Leaf]) -> None:
    """Print the cells with their state, and the FLOPs of all."""
    for leaf in found:
        state = "done" if (leaf.cell.folder / RESULT_FILE).exists() else "to do"
        steps = f"{leaf.cell.last_step:6} steps"
        if leaf.growth_steps:
            steps += f", grows at {', '.join(map(str, leaf.growth_steps))}"
        print(f"{state:6} seed {leaf.seed}  {leaf.flops / TERA:8.3f} TFLOP  {leaf.schedule.name}: {steps}")
    print(f"{len(found)} ends of schedules, {len(trunks(found))} runs")


def _run(given: argparse.Namespace, began: float) -> None:
    experiment = read_experiment(given.config)
    found = part_of(all_leaves(experiment, given.folder.resolve(), given.only), given.part)
    if given.list:
        print_list(found)
        return
    for number, leaf in enumerate(found, 1):
        if given.minutes and time.monotonic() - began > 60 * given.minutes:
            print(f"--minutes {given.minutes:g} are over: the same command goes on")
            return
        known = (leaf.cell.folder / RESULT_FILE).exists()
        record = measure(leaf)
        if not known:
            print(
                f"{number}/{len(found)} seed {leaf.seed} {leaf.schedule.name}: {record['loss']:.4f} "
                f"nats/token at {leaf.flops / TERA:.3f} TFLOP, step {leaf.cell.last_step}, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="the experiment, such as laptop.yaml")
    parser.add_argument("folder", type=Path, help="where the runs lie")
    parser.add_argument("--only", nargs="+", default=[], help="parts of names of schedules")
    parser.add_argument("--part", default="1/1", help="of the cells: i/n for job i of n")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no cell after so long; 0: no limit")
    parser.add_argument("--list", action="store_true", help="show the cells, run nothing")
    given = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as from SLURM: the run saves
    os.environ.setdefault("OMP_NUM_THREADS", "1" if not device_files() else "8")
    try:
        with path_errors():
            _run(given, began)
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on")
    except NexusError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(EXIT_CODE_USER_ERROR)


if __name__ == "__main__":
    main()

"""Run the experiment: base models, selections, cells, table and picture. Stop it at any time; it goes on.

python examples/unlearning/study.py runs/unlearning [--seeds 1 2 3] [--minutes 30] [--betas | --check]
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from base_model import train_base
from cell import BETAS, LOSSES, Cell, Measured, batch_size, losses_of, run_cell
from corpora import TASKS, make_corpus, write_lines
from models import SEQ_LENGTH, Base, LoadedBase
from selections import Selection, select_all
from tables import make_report

SEEDS = (1, 2, 3)
BASE_STEPS = 2400
SKETCH_SIZES = (64, 1024, 8192)
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
STEPS = (4, 8, 16, 24, 32, 48)
"""Where a run is measured: a step holds 8 samples of the forget set, which has 64."""
MEASURED = 128
"""Samples of those to keep, by chance, that are measured."""

Record = dict[str, Any]


class Results:
    """The records of a file, a line each, appended as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {self._key(json.loads(line)) for line in lines}

    def has(self, record: Record) -> bool:
        """Return whether there is a record of the same thing."""
        return self._key(record) in self._known

    def add(self, record: Record) -> None:
        """Append a record."""
        self._known.add(self._key(record))
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @staticmethod
    def _key(record: Record) -> tuple[object, ...]:
        return tuple(record.get(name) for name in ("kind", "seed", "task", "selection", "loss", "lr"))


@dataclass(frozen=True)
class Plan:
    """Which cells a seed has: every selection, or those of some names, with every loss at every rate."""

    tasks: Sequence[str] = TASKS
    losses: Sequence[str] = tuple(LOSSES)
    selections: Sequence[str] = ()

    def cells(self, seed: int, selections: dict[str, list[Selection]]) -> Iterator[tuple[Cell, Selection]]:
        """Yield the cells of a seed."""
        for task in self.tasks:
            for selection in selections[task]:
                if self.selections and selection.name not in self.selections:
                    continue
                for loss in self.losses:
                    for lr in RATES:
                        yield Cell(seed, task, selection.name, loss, lr), selection


BETA_PLAN = Plan(("trigger",), tuple(BETAS), ("exact", "oracle"))


def run_seed(seed: int, folder: Path, results: Results, until: float, plan: Plan) -> bool:
    """Run what is missing of a seed; return whether all of it is there."""
    run = train_base(folder / f"seed-{seed}", seed, BASE_STEPS)
    base, corpus = Base(run), make_corpus(seed)
    loaded = base.load()
    selections = select_all(base, corpus, seed, SKETCH_SIZES)
    measured = {task: _measured(loaded, seed, task) for task in TASKS}
    for task in TASKS:
        values = [
            round(loaded.probability(side), 5) for side in (measured[task].forget, measured[task].retain)
        ]
        record: Record = {
            "kind": "base",
            "seed": seed,
            "task": task,
            "forget": values[0],
            "retain": values[1],
        }
        if not results.has(record):
            results.add(record)
        for selection in selections[task]:
            record = {"kind": "selection", "seed": seed, "task": task, "selection": selection.name}
            if not results.has(record):
                results.add({**record, **selection.quality(corpus, task)})
    began, done = time.monotonic(), 0
    for cell, selection in plan.cells(seed, selections):
        record = {"kind": "cell", **vars(cell)}
        if results.has(record):
            continue
        if time.monotonic() > until:
            return False
        points, _ = run_cell(cell, loaded, base.config, corpus, selection, measured[cell.task], STEPS)
        results.add({**record, "points": points})
        done += 1
        if done % 50 == 0:
            rate = (time.monotonic() - began) / done
            sys.stdout.write(f"seed {seed}: {done} cells, {rate:.2f} s each\n")
            sys.stdout.flush()
    return True


def _measured(loaded: LoadedBase, seed: int, task: str) -> Measured:
    corpus = make_corpus(seed)
    others = [sample for sample in corpus.samples if sample.kind != task]
    kept = random.Random(f"measured {seed} {task}").sample(others, MEASURED)
    return Measured(loaded.tokens(corpus.forget_set(task)), loaded.tokens(kept))


def check(folder: Path, seed: int) -> None:
    """Compare a cell with `nexus unlearn` step by step, and print the largest difference of the losses."""
    base, corpus = Base(train_base(folder / f"seed-{seed}", seed, BASE_STEPS)), make_corpus(seed)
    loaded = base.load()
    selection = select_all(base, corpus, seed, SKETCH_SIZES)["domain"][-2]
    for loss in ("NPO, GDR", "GA, KLR"):
        cell, losses = Cell(seed, "domain", selection.name, loss, RATES[1]), losses_of(loss)
        own = _measured(loaded, seed, cell.task)
        _, trained = run_cell(cell, loaded, base.config, corpus, selection, own, STEPS[:3])
        out = folder / "check" / loss.replace(", ", "-")
        out.mkdir(parents=True, exist_ok=True)
        for name, side in {"forget": selection.forget, "retain": selection.retain}.items():
            write_lines(out / f"{name}.jsonl", [corpus.samples[number] for number in side])
        batch = batch_size(losses)
        words = (
            f"unlearn --load {base.run} --save {out / 'run'} --forget {out / 'forget.jsonl'} --retain "
            f"{out / 'retain.jsonl'} {LOSSES[loss]} --lr {cell.lr} --train-iters {STEPS[2]} --seed {seed} "
            f"--seq-length {SEQ_LENGTH} --micro-batch-size {batch} --global-batch-size {batch} "
            "--eval-interval 0"
        )
        metrics = out / "run" / "metrics.jsonl"
        if not metrics.exists():
            subprocess.run([sys.executable, "-m", "megatron_nexus", *words.split()], check=True)
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        theirs = [record["loss"] for record in records if "loss" in record]
        assert len(theirs) == len(trained) == STEPS[2]
        worst = max(abs(one - other) / abs(one) for one, other in zip(theirs, trained, strict=True))
        sys.stdout.write(
            f"{loss}, {selection.name}: {len(theirs)} losses of `nexus unlearn` and of the cell, "
            f"{theirs[0]:.6f} to {theirs[-1]:.6f}, differ by {worst:.1e} at most, relatively\n"
        )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no cell after that (default: 60)")
    parser.add_argument("--check", action="store_true", help="compare a cell with the command, and stop")
    text = "vary the inverse temperatures of NPO and SimNPO at the trigger, in a folder `betas` of its own"
    parser.add_argument("--betas", action="store_true", help=text)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for two
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.check:
        check(given.folder, given.seeds[0])
        return
    until = time.monotonic() + 60 * given.minutes
    output = given.folder / "betas" if given.betas else given.folder
    output.mkdir(exist_ok=True)
    results, plan = Results(output / "results.jsonl"), BETA_PLAN if given.betas else Plan()
    complete = sum(run_seed(seed, given.folder, results, until, plan) for seed in given.seeds)
    make_report(output / "results.jsonl", output)
    if complete < len(given.seeds):
        sys.stdout.write("the time is up: the same command goes on\n")


if __name__ == "__main__":
    main()

"""Kill a run at random moments around its saves, resume it, and see that nothing it had reported was lost.

    python tests/training/killed_saves_worker.py FOLDER --kills 50

Every life of the run is a real one of the command, on one rank and now and then on two, saving after each
step, by turns synchronous and asynchronous; it ends by SIGKILL. torch is imported once, every rank forked.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

import tests.support.preload  # noqa: F401 - what the ranks would import
from megatron_nexus import log
from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.rules import check
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.metrics import METRICS_FILE
from megatron_nexus.training.run import train
from tests.support.cli import SMALL
from tests.support.ports import free_port
from tests.support.waiting import TIMEOUT_S

FLAGS = "--train-iters 100000 --save-interval 1 --keep-latest 2 --keep-every 25 --load auto --save"
MODEL_PARALLEL = {1: [], 2: ["--pp", "2"]}
SAVED = re.compile(r"^saved (\S+) in", re.MULTILINE)


def live(argv: list[str], output: Path) -> None:
    """One rank of one life."""
    with output.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        world = read_world(os.environ)
        log.configure(is_main_rank=world.rank == 0)
        command = read_train_command(argv)
        config, checkpoint = command.config, command.checkpoint
        check(config, world.size)
        train(config, world, checkpoint, argv)


def begin(root: Path, ranks: int, async_save: bool) -> list[BaseProcess]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    argv = [
        *SMALL,
        *MODEL_PARALLEL[ranks],
        *FLAGS.split(),
        str(root),
        *(["--async-save"] if async_save else []),
    ]
    started = []
    for rank in range(ranks):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        started.append(
            multiprocessing.get_context("fork").Process(target=live, args=(argv, output_of(root, rank)))
        )
        started[-1].start()
    return started


def output_of(root: Path, rank: int) -> Path:
    return root.with_name(f"{root.name}-rank-{rank}.log")


def names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()] if root.is_dir() else []


def wait(ready: object, started: list[BaseProcess], root: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        alive = all(process.is_alive() for process in started) and time.monotonic() < deadline
        assert alive, "\n".join(output_of(root, rank).read_text() for rank in range(len(started)))
        time.sleep(0.0005)


def losses_of(root: Path) -> dict[int, float]:
    """By step; a last line that the kill cut is left out."""
    lines = (root / METRICS_FILE).read_text().split("\n")[:-1]
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}


def life_and_death(root: Path, ranks: int, async_save: bool, chance: random.Random) -> tuple[str, int]:
    """Start a run, kill it around a save; what of that save lay in the folder then, and the step reported."""
    before, output = newest_checkpoint(root), output_of(root, 0)
    output.unlink(missing_ok=True)
    started = begin(root, ranks, async_save)
    wait(lambda: output.exists() and SAVED.search(output.read_text()), started, root)
    time.sleep(chance.uniform(0, 0.3))
    if chance.random() < 0.7:  # else at any moment
        wait(lambda: any(name.startswith(".tmp_iter") for name in names(root)), started, root)
        time.sleep(chance.uniform(0, 0.06))
    for process in chance.sample(started, ranks):
        process.kill()
        time.sleep(chance.uniform(0, 0.02))
    for process in started:
        process.join()
    text = output.read_text()
    if before is not None:
        assert f"resumed {before} at iteration {int(before.name[5:])}," in text, text
    hidden = sorted({name.split("iter")[0] for name in names(root) if re.match(r"\.\w+_", name)})
    return ", ".join(hidden) or "between saves", max(int(Path(p).name[5:]) for p in SAVED.findall(text))


def kill_often(folder: Path, kills: int, ranks: int, chance: random.Random) -> Counter[str]:
    root = folder / f"run-{ranks}"
    found: Counter[str] = Counter()
    known: dict[int, float] = {}
    for number in range(kills):
        state, reported = life_and_death(root, ranks, async_save=number % 2 == 1, chance=chance)
        found[f"{'async' if number % 2 else 'sync'}: {state}"] += 1
        newest = newest_checkpoint(root)
        assert newest is not None and int(newest.name[5:]) >= reported, (newest, reported, names(root))
        kept = {*range(25, reported, 25), reported}
        for step in kept:
            CheckpointReader(root / f"iter_{step:07d}").verify()
        CheckpointReader(newest).verify()
        # Whatever was killed, every step is the one that was taken before, bit for bit.
        losses = losses_of(root)
        again = losses.keys() & known.keys()
        assert {step: losses[step] for step in again} == {step: known[step] for step in again}
        known |= losses
        print(f"kill {number + 1} of {kills} on {ranks}: {state}; reported {reported}, newest {newest.name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(Path("corpus"), np.uint16) as writer:
        for _ in range(60):
            writer.add_document(rng.integers(0, 97, 100))
    chance = random.Random(given.seed)
    on_two = max(1, given.kills // 6)
    found = kill_often(Path.cwd(), given.kills - on_two, 1, chance) + kill_often(
        Path.cwd(), on_two, 2, chance
    )
    for what, count in sorted(found.items()):
        print(f"{count:3} {what}")
    print(f"{given.kills} kills: always resumed, nothing lost that had been reported saved")
    sys.stdout.flush()
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()

"""Effective training time (ETTR) of a month of faults: real runs that are stopped and started again.

    python benchmarks/effective_time.py --folder DIR --gpus 16384 --days 3    faults for real, on this machine
    python benchmarks/effective_time.py                                       a month, computed

`fault_rates.py` draws the faults. A real run is `nexus train --tp 2` of 13,000 parameters, two processes on a
CPU, started again as a batch script does. Its time is scaled: a step stands for --step-seconds of a cluster.
Counted at full scale: faults by kind, steps lost, restarts, saves. Measured in seconds of this machine: from
a fault to the end of all ranks, from there to the next step. Given, as no cluster is at hand: how long a
restart takes there (--restart-seconds: queue, containers, imports, loading), and how long a save stops the
training (--save-seconds).
"""

import argparse
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mean, median

import numpy as np
from fault_rates import (
    DAY_S,
    GOES_ON,
    LLAMA3_GPUS,
    WAITS,
    Costs,
    Fault,
    Kind,
    best_interval_s,
    draw,
    ettr,
    faults_per_day,
    longest_restart_s,
)

from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.parallel.local_ranks import die_with_parent
from megatron_nexus.training.fault_injection import RECORD_FILE
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from megatron_nexus.training.run_times import RUN_TIMES_FILE

RESTART_CODES, FULL_DISK_CODES = (75, 137), (2,)
MODEL = (
    "--data-path corpus --split 8,2 --vocab-size 97 --num-layers 2 --hidden-size 16 --num-attention-heads 2 "
    "--kv-channels 8 --ffn-hidden-size 24 --nexus-m 20 --nexus-a 24 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 4 --fp32 --tp 2 --lr-warmup-iters 2 --lr-decay-style constant --log-interval 1 "
    "--eval-interval 0 --eval-iters 0 --keep-latest 3 --spike-policy skip --spike-rolling-interval 8 "
    "--spike-sigma-factor 50"
)
CALM_STEPS = 16
"""Without a spike or a wrong number: the run has to know its losses first."""
HEARTBEAT_S = 2
"""--rank-heartbeat-timeout of the real run."""


@dataclass(frozen=True)
class Outcome:
    """What a fault has cost in a real run; seconds are this machine's, but for `lost_s`."""

    kind: Kind
    noticed_s: float = 0.0
    """From the fault to the end of all ranks; 0 where the run went on."""
    back_s: float = 0.0
    """From there to the next step."""
    lost_steps: int = 0
    lost_s: float = 0.0
    """The same at the scale of the cluster, with the part of a step before the fault."""
    restarts: int = 0


@dataclass(frozen=True)
class Stopped:
    """A start of the run that a fault has ended, at `ended`, when it had made `done` steps."""

    fault: Fault
    done: int
    noticed_s: float
    ended: float


@dataclass
class Account:
    """What is known of a run so far: it is written after each start, and the same command goes on from it."""

    outcomes: list[Outcome] = field(default_factory=list)
    stopped: Stopped | None = None
    is_over: bool = False


def make_corpus(folder: Path) -> None:
    """Write the random tokens that the runs read."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(60):
            writer.add_document(rng.integers(0, 97, 100))


def by_step(faults: Sequence[Fault], step_s: float, steps: int) -> dict[int, Fault]:
    """Return the faults by the step in which they happen, one in a step."""
    found: dict[int, Fault] = {}
    for fault in faults:
        step = max(CALM_STEPS if fault.kind in GOES_ON else 3, math.ceil(fault.when_s / step_s))
        while step in found:
            step += 1
        if step <= steps:
            found[step] = fault
    return found


def injection(planned: dict[int, Fault]) -> list[str]:
    """Return the flag --inject; a damaged checkpoint begins with a rank that is killed."""
    kinds = {"damaged_checkpoint": "rank_killed"}
    words = [f"{kinds.get(f.kind, f.kind)}@{step},rank={f.rank}" for step, f in sorted(planned.items())]
    return ["--inject", *words] if words else []


def start(folder: Path, save: str, steps: int, flags: Sequence[str], log: Path) -> int:
    """Run the command to its end and return its exit code."""
    command = [sys.executable, "-m", "megatron_nexus", "train", *MODEL.split(), "--train-iters", str(steps)]
    command += ["--save", save, "--load", "auto", "--rank-heartbeat-timeout", str(HEARTBEAT_S), *flags]
    with log.open("ab") as file:
        run = subprocess.run(
            command, cwd=folder, stdout=file, stderr=file, check=False, preexec_fn=die_with_parent
        )
    return run.returncode


def run_through(
    folder: Path, account: Account, planned: dict[int, Fault], steps: int, given: argparse.Namespace
) -> None:
    """Start the run once, and enter into `account` what the fault before it has cost, and what ended it."""
    run_dir, log = folder / "faulty", folder / "faulty.log"
    log.touch()
    read_before = log.stat().st_size
    code = start(folder, run_dir.name, steps, [*save_interval(given), *injection(planned)], log)
    ended = time.time()
    text = log.read_bytes()[read_before:].decode(errors="replace")
    assert_nothing_left(folder)
    if stopped := account.stopped:
        resumed = re.search(r"^resumed \S+ at iteration (\d+)", text, re.MULTILINE)
        first = int(resumed[1]) if resumed else 0
        lost_s = max(stopped.fault.when_s, stopped.done * given.step_seconds) - first * given.step_seconds
        back_s = training_began(run_dir, stopped.ended) - stopped.ended
        outcome = Outcome(
            stopped.fault.kind, stopped.noticed_s, back_s, stopped.done - first, lost_s, restarts=1
        )
        account.outcomes.append(outcome)
        print(len(account.outcomes), outcome, flush=True)
    account.stopped, account.is_over = None, code == 0
    if account.is_over:
        return
    step, when = last_stop(run_dir / RECORD_FILE)
    fault = planned[step]
    assert code in (FULL_DISK_CODES if fault.kind == "disk_full" else RESTART_CODES), (code, fault, log)
    # A run whose disk is full makes its steps up to the next save; they are lost as well.
    last = max(record["step"] for record in read_metrics(run_dir / METRICS_FILE) if "loss" in record)
    account.stopped = Stopped(fault, max(step - 1, last), ended - when, ended)
    if fault.kind == "damaged_checkpoint" and (newest := newest_checkpoint(run_dir)):
        damage(Path(str(newest)))


def save_interval(given: argparse.Namespace) -> list[str]:
    """Return the flag --save-interval of the real run."""
    return ["--save-interval", str(max(1, round(given.interval / given.step_seconds)))]


def last_stop(record: Path) -> tuple[int, float]:
    """Return the step and the time of the last fault that ends a run."""
    lines = record.read_text().splitlines()
    ending = [line for line in lines if not line.startswith(GOES_ON)]
    step = int(ending[-1].split(",")[0].partition("@")[2])
    if ending[-1] == lines[-1]:
        return step, record.stat().st_mtime  # finer than the record's whole seconds
    return step, datetime.fromisoformat(ending[-1].split()[1]).timestamp()


def training_began(run_dir: Path, after: float) -> float:
    """Return when the first step of the start after a moment began."""
    records = map(json.loads, (run_dir / RUN_TIMES_FILE).read_text().splitlines())
    return next(float(r["time"]) for r in records if r["what"] == "training" and r["time"] > after)


def damage(checkpoint: Path) -> None:
    """Flip a bit in a checkpoint."""
    path = sorted(checkpoint.glob("rank_*.safetensors"))[-1]
    contents = bytearray(path.read_bytes())
    contents[-9] ^= 1
    path.write_bytes(contents)


def assert_nothing_left(folder: Path) -> None:
    """Fail where a process of the run lives, or a file of it is in shared memory."""
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdigit() and (entry / "cwd").readlink() == folder
        except OSError:
            continue
        assert not is_ours or int(entry.name) == os.getpid(), f"process {entry.name} is left"
    left = list(Path("/dev/shm").glob("deepspeed*"))
    assert not left, left


def assert_as_never_stopped(folder: Path, steps: int) -> None:
    """Fail where losses or tensors of the last checkpoint are not, bit for bit, those of the whole run."""
    whole, faulty = folder / "whole", folder / "faulty"
    losses = [
        {r["step"]: (r["loss"], r["grad_norm"]) for r in read_metrics(run / METRICS_FILE) if "loss" in r}
        for run in (whole, faulty)
    ]
    assert list(losses[0]) == list(range(1, steps + 1))
    assert losses[0] == losses[1]
    paths = sorted((whole / f"iter_{steps:07d}").glob("rank_*.safetensors"))
    assert paths
    for path in paths:
        assert path.read_bytes() == (faulty / path.parent.name / path.name).read_bytes(), path.name
    assert not list(faulty.glob(".tmp*")), "half a checkpoint is left"


def run_for_real(given: argparse.Namespace) -> None:
    """Let the faults of some days happen, and print what they have cost."""
    folder, began = Path(given.folder).resolve(), time.monotonic()
    steps = round(given.days * DAY_S / given.step_seconds)
    planned = by_step(draw(given.gpus, given.days, given.seed), given.step_seconds, steps)
    record = folder / "account.pickle"
    if not record.exists():
        folder.mkdir(parents=True)
        make_corpus(folder)
        spikes = {step: fault for step, fault in planned.items() if fault.kind == "spike"}
        flags = [*save_interval(given), *injection(spikes)]
        code = start(folder, "whole", steps, flags, folder / "whole.log")
        assert code == 0, f"exit code {code}: see {folder / 'whole.log'}"
        record.write_bytes(pickle.dumps(Account()))
    account: Account = pickle.loads(record.read_bytes())
    while not account.is_over:
        if time.monotonic() - began > given.budget:
            print("the time is up: the same command goes on")
            return
        run_through(folder, account, planned, steps, given)
        record.write_bytes(pickle.dumps(account))
    assert_as_never_stopped(folder, steps)
    outcomes = account.outcomes + [Outcome(f.kind) for f in planned.values() if f.kind in GOES_ON]
    print(
        f"{given.days:g} days on {given.gpus:,} GPUs, seed {given.seed}: {steps:,} steps of "
        f"{given.step_seconds:g} s, a save every {given.interval:g} s, {len(planned)} faults. Losses, "
        "gradient norms and the last checkpoint are those of a run never stopped, bit for bit; no process, "
        f"shared memory or half checkpoint is left. Load {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs."
    )
    print_outcomes(outcomes)
    print_ettr(given, outcomes, steps)


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Print the faults by kind: median seconds, mean steps lost."""
    heads = ("fault", "count", "to the end, s", "to a step, s", "steps lost", "restarts")
    print("{:20}{:>8}{:>15}{:>14}{:>12}{:>10}".format(*heads))
    for kind in sorted({outcome.kind for outcome in outcomes}):
        some = [outcome for outcome in outcomes if outcome.kind == kind]
        noticed_s, back_s = (median(getattr(o, name) for o in some) for name in ("noticed_s", "back_s"))
        lost, restarts = mean(o.lost_steps for o in some), sum(o.restarts for o in some)
        print(f"{kind:20}{len(some):8}{noticed_s:15.1f}{back_s:14.1f}{lost:12.1f}{restarts:10}")


def print_ettr(given: argparse.Namespace, outcomes: Sequence[Outcome], steps: int) -> None:
    """Print the ETTR of the real run at the cluster's scale, with a restart as measured and as given."""
    trained_s = steps * given.step_seconds
    lost_s = sum(outcome.lost_s for outcome in outcomes)
    saving_s = trained_s // given.interval * given.save_seconds
    stops = [outcome for outcome in outcomes if outcome.restarts]
    # The time-out of this run becomes the cluster's.
    noticed_s = sum(o.noticed_s + (given.heartbeat - HEARTBEAT_S) * (o.kind in WAITS) for o in stops)
    for cause, back_s in (
        ("as measured here", sum(outcome.back_s for outcome in stops)),
        (f"of {given.restart_seconds:g} s", given.restart_seconds * len(stops)),
    ):
        total_s = trained_s + lost_s + saving_s + noticed_s + back_s
        hours = [s / 3600 for s in (lost_s, noticed_s, back_s, saving_s, total_s)]
        print(
            "ETTR {:.2f} % with restarts {}: hours of lost steps {:.2f}, from faults to ends {:.2f}, to the "
            "next steps {:.2f}, of saves {:.2f}, in all {:.1f}".format(
                100 * trained_s / total_s, cause, *hours
            )
        )


def print_month(given: argparse.Namespace) -> None:
    """Print what a month loses by the number of GPUs, at the given interval of saves and at the best one."""
    heads = ("GPUs", "faults", "apart, h", "saves, s apart", "ETTR, %", "5 to 95 %", "restart for 97 %, s")
    print("{:>7}{:>8}{:>10}{:>16}{:>9}{:>15}{:>21}".format(*heads))
    for gpus in given.sizes:
        for interval_s in (given.interval, best_interval_s(gpus, given.save_seconds)):
            costs = Costs(interval_s, given.save_seconds, given.restart_seconds, given.heartbeat)
            months = [draw(gpus, 30, seed) for seed in range(given.months)]
            ratios = sorted(100 * ettr(30, month, costs) for month in months)
            low, high = ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]
            apart_h = 24 / faults_per_day(gpus)
            allowed = longest_restart_s(gpus, costs, 0.97)
            print(
                f"{gpus:7,}{720 / apart_h:8.1f}{apart_h:10,.1f}{interval_s:16,.0f}{mean(ratios):9.2f}"
                f"{low:8.2f} {high:6.2f}{allowed:21,.0f}"
            )


def main() -> None:
    """Read the flags, run or compute, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", help="of a real run; the same command goes on in it")
    add("--budget", type=float, default=math.inf, help="seconds after which no further start begins")
    add("--gpus", type=int, default=LLAMA3_GPUS, help="of the real run's faults")
    add("--days", type=float, default=3.0)
    add("--seed", type=int, default=0)
    add("--step-seconds", type=float, default=60.0, help="of the cluster, for which a step stands")
    add("--interval", type=float, default=600.0, help="seconds of the cluster between saves")
    add("--heartbeat", type=float, default=60.0, help="--rank-heartbeat-timeout of the cluster")
    add("--restart-seconds", type=float, default=60.0, help="of the cluster, from the end to the next step")
    add("--save-seconds", type=float, default=1.0, help="of the cluster, that a save stops it (--async-save)")
    add("--sizes", type=int, nargs="+", default=[8, 512, LLAMA3_GPUS])
    add("--months", type=int, default=200, help="drawn for the table")
    given = parser.parse_args()
    if given.folder:
        run_for_real(given)
    else:
        print_month(given)


if __name__ == "__main__":
    main()

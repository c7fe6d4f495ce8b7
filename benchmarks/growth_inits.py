"""What the initial values of new weights are worth: growth by each --init, beside none and a new large model.

    python benchmarks/growth_inits.py runs/inits --seeds 3            about 30 minutes of one core

For each seed a small base model is trained on the built-in corpus at a constant learning rate, then trained
on for as long with one decay at the end (WSD): as it is, and grown along M and A by each init. The grown
size is also trained from scratch on as many tokens under the same schedule: what it gains over no growth is
the ceiling, the most that growth could gain at equal tokens. The last two show what a second decay costs:
their base has decayed before it is trained on, by cosine both times. All runs of a seed read the same
samples in the same order, and are validated on the same ones: differences are taken within a seed.

What is finished is not done again: after an interruption, or for more seeds, give the same command. At the
end the table is printed, and the picture written to FOLDER/inits.png. Needs scipy.
"""

import argparse
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t as student

from megatron_nexus.training.metrics import METRICS_FILE, read_metrics

REPOSITORY = Path(__file__).parents[1]
STEPS = 400
"""Of each of the two phases."""
SIZES = "--nexus-m 112 --nexus-a 144"
LARGER = "nexus_m=224 nexus_a=288"
MODEL = (
    "--vocab-size 1024 --num-layers 2 --hidden-size 96 --num-attention-heads 4 --kv-channels 24 "
    "--ffn-hidden-size 256 --seq-length 128 --global-batch-size 16 --micro-batch-size 16 --fp32 "
    "--lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 20"
)
ONE_DECAY = "--lr-decay-style WSD --lr-wsd-decay-iters 160"
TELL = "--eval-interval 50 --eval-iters 32 --log-interval 100"
INITS = {"out_rand": "init=out_rand", "in_rand": "init=in_rand"}
"""Not `zero`, which trains as no growth does, to the last digit (tests/growth/test_laws.py)."""
BASE, UNGROWN, SCRATCH = "base", "no growth", "from scratch"
DECAYED, UNGROWN_TWICE, GROWN_TWICE = "decayed base", "no growth, two decays", "in_rand, two decays"
NAMES = [UNGROWN, *INITS, SCRATCH, DECAYED, UNGROWN_TWICE, GROWN_TWICE]
BASES = (BASE, DECAYED)
CONFIDENCE = 0.95

Curve = dict[int, float]
"""Validation loss in nats per token, by step."""


def words_of(name: str, seed: int) -> list[str]:
    """What a run is started with, in the folder of its seed."""
    if name in BASES:
        style = "constant" if name == BASE else "cosine"
        return shlex.split(f"{MODEL} {SIZES} --seed {seed} --train-iters {STEPS} --lr-decay-style {style}")
    if name == SCRATCH:
        larger = " ".join(f"--{size.replace('_', '-').replace('=', ' ')}" for size in LARGER.split())
        return shlex.split(f"{MODEL} {larger} --seed {seed} --train-iters {2 * STEPS} {ONE_DECAY}")
    if name in (UNGROWN_TWICE, GROWN_TWICE):
        words = shlex.split(
            f"--load {folder_name(DECAYED)} --train-iters {2 * STEPS} --lr-start-iter {STEPS}"
        )
    else:
        words = shlex.split(f"--load {BASE} --train-iters {2 * STEPS} {ONE_DECAY}")
    init = INITS["in_rand"] if name == GROWN_TWICE else INITS.get(name)
    if init:
        words += ["--grow", f"{LARGER} {init} growth_seed={seed}"]
    return words


def folder_name(name: str) -> str:
    return name.replace(" %", "").replace(",", "").replace(" ", "-")


def curve_of(folder: Path) -> Curve:
    records = read_metrics(folder / METRICS_FILE)
    return {r["step"]: r["validation_loss"] for r in records if r.get("name") == "validation"}


def train(name: str, seed: int, root: Path) -> Curve:
    """The validations of a run, which is done unless it is finished."""
    last = STEPS if name in BASES else 2 * STEPS
    folder = root / folder_name(name)
    if last in (curve := curve_of(folder)):
        return curve
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / "pretrain_nexus.py"), *words_of(name, seed), *TELL.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with (root / f"{folder_name(name)}.log").open("w") as log:
        subprocess.run(
            [*command, "--save", folder_name(name)],
            cwd=root,
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
        )
    curve = curve_of(folder)
    print(f"seed {seed}, {name}: {curve[last]:.4f} nats/token at step {last}", flush=True)
    return curve


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference, half the width of its t interval, two-sided p value of no difference."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, n = statistics.mean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0.0:
        return mean, 0.0, 1.0 if mean == 0.0 else 0.0
    half = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return mean, half, float(2 * student.sf(abs(mean) / error, n - 1))


def tell(curves: dict[str, list[Curve]]) -> None:
    """The table, in Markdown."""
    final = {name: [c[2 * STEPS] for c in runs] for name, runs in curves.items() if name not in BASES}
    seeds = len(final[UNGROWN])
    comparisons = len(final) - 1
    print(f"\n| continued | validation loss, mean of {seeds} | s.e. | minus no growth, 95 % | p |")
    print("|---|---:|---:|---:|---:|")
    for name, values in final.items():
        error = statistics.stdev(values) / math.sqrt(seeds)
        cells = ["", ""]
        if name != UNGROWN:
            mean, half, p = paired(values, final[UNGROWN])
            significant = f"{p:.2g}" + (" *" if p * comparisons < 1 - CONFIDENCE else "")
            cells = [f"{mean:+.4f} ± {half:.4f}", significant]
        print(f"| {name} | {statistics.mean(values):.4f} | {error:.4f} | {cells[0]} | {cells[1]} |")
    print(f"\n* below 0.05 after Bonferroni's correction for {comparisons} comparisons")
    pairs = [("in_rand", "out_rand")]
    pairs += [(UNGROWN_TWICE, UNGROWN), (GROWN_TWICE, "in_rand")]
    mean, half, p = paired(final[SCRATCH], final[UNGROWN])
    print(f"ceiling, {SCRATCH} minus {UNGROWN}: {mean:+.4f} ± {half:.4f}, p = {p:.2g}")
    for one, other in pairs:
        mean, half, p = paired(final[one], final[other])
        print(f"{one} minus {other}: {mean:+.4f} ± {half:.4f}, p = {p:.2g}")


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Left the mean validation losses, right how far each lies from no growth, with the s.e. of the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=80, layout="constrained")
    base = curves[BASE]
    steps = sorted(base[0])
    left.plot(steps, [statistics.mean(c[s] for c in base) for s in steps], color="black", label=BASE)
    for index, name in enumerate(name for name in NAMES if name not in BASES):
        colour = "black" if name == UNGROWN else f"C{index}"
        runs, dashes = curves[name], ":" if name == UNGROWN else "-"
        steps = sorted(runs[0])
        left.plot(
            steps, [statistics.mean(c[s] for c in runs) for s in steps], dashes, color=colour, label=name
        )
        steps = [step for step in steps if step > STEPS]
        rows = [[c[s] - ungrown[s] for c, ungrown in zip(runs, curves[UNGROWN], strict=True)] for s in steps]
        means = [statistics.mean(row) for row in rows]
        errors = [statistics.stdev(row) / math.sqrt(len(row)) for row in rows]
        if name not in (SCRATCH, UNGROWN_TWICE, GROWN_TWICE):
            right.errorbar(steps, means, errors, fmt=dashes, color=colour, capsize=2)
    left.axvline(STEPS, color="grey", linewidth=0.5)
    left.set(xlabel="optimizer step", ylabel="validation loss, nats per token", ylim=(None, 5.0))
    right.set(xlabel="optimizer step", ylabel="minus that of no growth, ± s.e.")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the runs lie")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds must be 2 or more: without there is no error to tell")
    curves: dict[str, list[Curve]] = {}
    for seed in range(1, given.seeds + 1):
        for name in (BASE, *NAMES):
            curves.setdefault(name, []).append(train(name, seed, given.folder / f"seed-{seed}"))
    tell(curves)
    draw(curves, given.folder / "inits.png")
    print(f"\npicture: {given.folder / 'inits.png'}")


if __name__ == "__main__":
    main()

"""Tables and picture of the experiment, from its results.jsonl alone.

    python examples/unlearning/tables.py examples/unlearning/results.jsonl --output docs/assets/unlearning

The number of a method is the area under its front (the hypervolume): of all measured points (forget f, retain
r), each divided by the base model's, the area of {f' >= f, r' <= r} in the unit square. 1 is everything
forgotten and everything kept. Intervals are 95 % percentiles of the mean over seeds drawn with replacement.
"""

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DRAWS = 10_000
TITLES = {"trigger": "trigger (one common answer)", "domain": "domain (distinct answers)"}
Points = list[tuple[float, float]]


def area(points: Points) -> float:
    """Return the area of the unit square that points (forget, retain) dominate."""
    total, best, right = 0.0, 0.0, 1.0
    front = sorted((min(f, 1.0), min(r, 1.0)) for f, r in points)
    steps: Points = []
    for f, r in front:
        if r > best:
            best = r
            steps.append((f, r))
    for f, r in reversed(steps):
        total += (right - f) * r
        right = f
    return total


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean over seeds and its 95 % bootstrap interval; NaN of none, where cells are missing."""
    if not values:
        return np.nan, np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(values), (DRAWS, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return statistics.fmean(values), float(low), float(high)


class Results:
    """The areas of every task, selection and loss by seed; precision and leak of the selections."""

    def __init__(self, path: Path) -> None:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        bases = {(r["seed"], r["task"]): (r["forget"], r["retain"]) for r in records if r["kind"] == "base"}
        points: dict[tuple[str, str, str, int], Points] = defaultdict(list)
        for record in records:
            if record["kind"] == "cell":
                key = record["task"], record["selection"], record["loss"], record["seed"]
                f0, r0 = bases[record["seed"], record["task"]]
                points[key] += [(f / f0, r / r0) for _, f, r in record["points"]]
        cells = Counter(record["seed"] for record in records if record["kind"] == "cell")
        self.seeds = sorted(seed for seed, count in cells.items() if count == max(cells.values()))
        """Those that are complete."""
        self.points = {key: found for key, found in points.items() if key[3] in self.seeds}
        self.cells = sum(cells[seed] for seed in self.seeds)
        self.qualities: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self.bases = bases
        for record in records:
            if record["kind"] == "selection" and record["seed"] in self.seeds:
                self.qualities[record["task"], record["selection"]].append(record)

    def quality(self, task: str, selection: str) -> tuple[float, float]:
        """Return precision and leak, the means over seeds."""
        found = self.qualities[task, selection]
        return statistics.fmean(q["precision"] for q in found), statistics.fmean(q["leak"] for q in found)

    def names(self, position: int) -> list[str]:
        """Return the tasks (0), selections (1) or losses (2), in the order in which they ran."""
        return list(dict.fromkeys(str(key[position]) for key in self.points))

    def areas(self, task: str, selection: str, loss: str) -> dict[int, float]:
        """Return the area of each seed."""
        return {
            seed: area(found)
            for (of_task, chosen, by, seed), found in self.points.items()
            if (of_task, chosen, by) == (task, selection, loss)
        }


def tables(results: Results) -> str:
    """Return the tables of all tasks in Markdown: areas, precision, leak."""
    losses = results.names(2)
    lines = []
    for task in results.names(0):
        head = ["selection", "precision", "leak", *losses]
        lines += [
            f"**{TITLES[task]}**",
            "",
            f"| {' | '.join(head)} |",
            "|---|---:|---:|" + "---:|" * len(losses),
        ]
        for selection in results.names(1):
            shares = results.quality(task, selection)
            cells = []
            for loss in losses:
                found = list(results.areas(task, selection, loss).values())
                mean, low, high = interval(found)
                cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]" if found else "")
            lines.append(f"| {selection} | {shares[0]:.2f} | {shares[1]:.2f} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def differences(results: Results, against: str, names: Sequence[str]) -> str:
    """Return, in Markdown, the areas of selections minus that of another, seed by seed, over all losses."""
    lines = [
        f"| minus {against} | {' | '.join(TITLES[task] for task in results.names(0))} |",
        "|---|" + "---:|" * len(results.names(0)),
    ]
    for name in names:
        cells = []
        for task in results.names(0):
            by_seed: Mapping[int, list[float]] = defaultdict(list)
            for loss in results.names(2):
                reference = results.areas(task, against, loss)
                for seed, value in results.areas(task, name, loss).items():
                    if seed in reference:
                        by_seed[seed].append(value - reference[seed])
            mean, low, high = interval([statistics.fmean(values) for values in by_seed.values()])
            cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" if by_seed else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Draw the fronts of one loss, and the areas of all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks, selections, losses = (results.names(position) for position in range(3))
    colors = {name: pyplot.colormaps["tab10"](number) for number, name in enumerate(selections)}
    figure, rows = pyplot.subplots(
        2, len(tasks), figsize=(6 * len(tasks), 10), dpi=110, layout="constrained", squeeze=False
    )
    shown = "NPO, GDR" if "NPO, GDR" in losses else losses[0]
    for column, task in enumerate(tasks):
        axes = rows[0][column]
        for selection in selections:
            grid = np.linspace(0, 1, 201)
            curves = []
            for (of_task, chosen, loss, _), points in results.points.items():
                if (of_task, chosen, loss) == (task, selection, shown):
                    best = [max((r for f, r in [*points, (1.0, 1.0)] if f <= x), default=0.0) for x in grid]
                    curves.append(best)
            if not curves:
                continue
            precision, leak = results.quality(task, selection)
            label = f"{selection}: precision {precision:.2f}, leak {leak:.2f}"
            style = "--" if selection.startswith(("oracle", "random")) else "-"
            axes.plot(
                grid, np.minimum(np.mean(curves, axis=0), 1), style, color=colors[selection], label=label
            )
        axes.set(
            xlabel="probability of the answers to forget, of the base model's",
            ylabel="best probability of the others",
            title=f"{TITLES[task]}: fronts of {shown}, mean of seeds",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        axes = rows[1][column]
        width = 0.8 / len(selections)
        for number, selection in enumerate(selections):
            found = [interval(list(results.areas(task, selection, loss).values())) for loss in losses]
            places = np.arange(len(losses)) + (number - len(selections) / 2) * width
            means = np.array([mean for mean, _, _ in found])
            errors = [means - [low for _, low, _ in found], np.array([high for _, _, high in found]) - means]
            axes.bar(places, means, width, yerr=errors, color=colors[selection], error_kw={"lw": 0.8})
        axes.set(
            xticks=np.arange(len(losses)), xticklabels=losses, ylim=(0, 1.02), ylabel="area under the front"
        )
        axes.set_title(f"{TITLES[task]}: areas, 95 % intervals")
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(path)
    pyplot.close(figure)


def make_report(path: Path, output: Path) -> None:
    """Write tables.md and fronts.png, and print the tables; nothing without a cell."""
    results = Results(path)
    if not results.cells:
        return
    found = results.names(1)
    parts = [f"{results.cells} runs, seeds {', '.join(map(str, results.seeds))}.", tables(results).rstrip()]
    for against, names in (
        ("oracle", ["exact", *(name for name in found if name not in ("oracle", "exact"))]),
        ("exact", [name for name in found if name not in ("oracle", "exact")]),
    ):
        if against in found and (names := [name for name in names if name in found]):
            parts.append(differences(results, against, names))
    text = "\n\n".join(parts) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text(text)
    draw(results, output / "fronts.png")
    sys.stdout.write(text)


def main() -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    make_report(given.results, given.output)


if __name__ == "__main__":
    main()

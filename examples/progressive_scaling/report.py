"""Tables and figures of an experiment, from what `run.py` left or from a results.jsonl.

    python examples/progressive_scaling/report.py CONFIG.yaml runs/scaling
    python examples/progressive_scaling/report.py CONFIG.yaml results.jsonl --output docs/assets/scaling

Writes tables.md (or the tables of --page), frontier.png, recipes.png and ceilings.png into the folder, or
into --output; from a folder of runs also results.jsonl, one line for each end of a schedule.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import figures
from analysis import Result, Study, holm, paired, read_results, result_of
from experiment import TERA, Ceiling, read_experiment
from run import RESULT_FILE

from megatron_nexus.analysis.estimate import Estimate, estimate
from megatron_nexus.errors import EXIT_CODE_USER_ERROR, ConfigError, NexusError, path_errors

RESULTS_FILE = "results.jsonl"
BEGIN, END = "<!-- tables: report.py -->\n", "<!-- end of tables -->\n"
"""What stands around the tables in a page that --page rewrites."""


def collect(folder: Path) -> list[Result]:
    """Read the results of all cells in a folder of runs, and write them to its results.jsonl."""
    records = [json.loads(path.read_text()) for path in sorted(folder.rglob(RESULT_FILE))]
    if not records:
        raise ConfigError(
            f"{folder} has no results: give the folder that run.py has written, or a results.jsonl"
        )
    records.sort(key=lambda record: (record["schedule"], record["seed"], record["flops"]))
    (folder / RESULTS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return [result_of(record) for record in records]


def interval(found: Estimate | None, scale: float = 1.0, digits: int = 4) -> str:
    """Write an estimate as a cell of a table."""
    if found is None:
        return ""
    half = "" if math.isnan(found.half) else f" ± {found.half * scale:.{digits}f}"
    return f"{found.mean * scale:+.{digits}f}{half}"


def p_value(p: float) -> str:
    """Write a p value."""
    return "" if math.isnan(p) else f"{p:.2g}"


def frontier_table(study: Study) -> list[str]:
    """Return losses from scratch by schedule and budget; the frontier is in bold."""
    budgets = study.budgets
    if not budgets:
        return ["None was run."]
    lines = ["| from scratch | " + " | ".join(f"{budget / TERA:.2g} TFLOP" for budget in budgets) + " |"]
    lines.append("|---|" + "---:|" * len(budgets))
    for name, runs in study.scratch.items():
        cells = []
        for budget in budgets:
            found = runs.at(budget)
            if not found:
                cells.append("")
                continue
            mean = estimate([r.loss for r in found.values()])
            text = f"{mean.mean:.4f}" + (f" ± {mean.error:.4f}" if mean.n > 1 else "") + f" ({mean.n})"
            best = study.best(budget, found)
            cells.append(f"**{text}**" if best is not None and best.name == name else text)
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", "Mean ± s.e. (seeds). Bold: no other has a lower mean over these seeds."]


def ceiling_at_equal_tokens(study: Study, ceiling: Ceiling) -> tuple[int, str, str, Estimate] | None:
    """Return steps, both schedules at their best rate, and large minus small, at the most common steps."""
    steps: set[int] = set.intersection(
        *(
            {r.steps for runs in study.scratch.values() if runs.first.shape == shape for r in runs.results}
            for shape in (ceiling.small, ceiling.large)
        )
    )
    found = None
    for count in sorted(steps):
        at = {name: runs.at_steps(count) for name, runs in study.scratch.items()}
        if chosen := _best_pair(study, ceiling, at):
            small, large = chosen
            difference = paired(at[large], at[small])
            assert difference is not None
            found = (count, small, large, difference)
    return found


def _best_pair(
    study: Study, ceiling: Ceiling, at: Mapping[str, Mapping[int, Result]]
) -> tuple[str, str] | None:
    """Return the best schedules of both shapes over the most seeds that they share."""
    groups = [
        [name for name, runs in study.scratch.items() if runs.first.shape == shape and at[name]]
        for shape in (ceiling.small, ceiling.large)
    ]
    shared: set[int] = set()
    for small in groups[0]:
        for large in groups[1]:
            shared = max(shared, set(at[small]) & set(at[large]), key=len)
    if not shared:
        return None
    best = [
        min(
            (name for name in group if shared <= set(at[name])),
            key=lambda name: sum(at[name][seed].loss for seed in shared),
        )
        for group in groups
    ]
    return best[0], best[1]


def ceiling_table(study: Study, ceilings: Sequence[Ceiling]) -> list[str]:
    """Return what size is worth from scratch along each axis, at equal tokens and at equal FLOPs.

    Nothing where no ceiling is named or measured.
    """
    lines = [
        "| axis | small | large | tokens | large - small, 95 % | p | at equal FLOPs | TFLOP |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for ceiling in ceilings:
        found = ceiling_at_equal_tokens(study, ceiling)
        if found is None:
            continue
        steps, small, large, difference = found
        tokens = next(iter(study.scratch[small].at_steps(steps).values())).tokens
        equal, at = equal_flops(study, ceiling)
        lines.append(
            f"| {ceiling.axis} | {small} | {large} | {tokens / 1e6:.2f}M | {interval(difference)} "
            f"({difference.n}) | {p_value(difference.p)} | {interval(equal)} | {at} |"
        )
    return lines if len(lines) > 2 else []


def equal_flops(study: Study, ceiling: Ceiling) -> tuple[Estimate | None, str]:
    """Return large minus small at the largest budget that both have."""
    for budget in reversed(study.budgets):
        at = {name: runs.at(budget) for name, runs in study.scratch.items()}
        if chosen := _best_pair(study, ceiling, at):
            small, large = chosen
            return paired(at[large], at[small]), f"{budget / TERA:.2g}"
    return None, ""


def growth_table(study: Study) -> list[str]:
    """Return every grown schedule at its largest budget against its target from scratch and the frontier.

    A reference that has no run with the same FLOPs and seed leaves its cells empty.
    """
    rows = []
    for runs in study.grown.values():
        budget = runs.budgets[-1]
        frontier = study.differences(runs, budget)
        target = study.differences(runs, budget, runs.first.shape)
        gap = estimate(list(frontier[1].values())) if frontier else None
        reference = frontier[0].name if frontier else ""
        rows.append((runs, budget, reference, gap, target, study.saved(runs, budget, runs.first.shape)))
    corrected = holm([gap.p if gap else math.nan for _, _, _, gap, _, _ in rows])
    lines = [
        "| schedule | grows at | TFLOP | loss (seeds) | minus its target from scratch | saved against that, "
        "% | minus the frontier | p | p, Holm | saved against the frontier, % | frontier |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (runs, budget, reference, gap, target, saved), p in sorted(
        zip(rows, corrected, strict=True),
        key=lambda row: (f"{row[0][1] / TERA:.2g}", row[0][3].mean if row[0][3] else math.inf),
    ):
        losses = [r.loss for r in runs.at(budget).values()]
        grown = ", ".join(f"{step / runs.results[-1].steps:.0%}" for step in runs.results[-1].growth_steps)
        against = interval(estimate(list(target[1].values()))) if target else ""
        lines.append(
            f"| {runs.name} | {grown} | {budget / TERA:.2g} | {sum(losses) / len(losses):.4f} "
            f"({len(losses)}) | {against} | {interval(saved, 100, 1)} | {interval(gap)} | "
            f"{p_value(gap.p) if gap else ''} | {p_value(p)} | {interval(study.saved(runs, budget), 100, 1)} "
            f"| {reference} |"
        )
    return [
        *lines,
        "",
        "At equal FLOPs, the base's included. Paired by seed, ± half a 95 % interval. Holm: corrected for "
        f"the {sum(not math.isnan(p) for p in corrected)} with several seeds. Grows at: share of all steps."
        + ("" if all(row[3] for row in rows) else " Empty: no run from scratch of these FLOPs and seeds."),
    ]


def recipe_tables(study: Study) -> list[str]:
    """Return, for schedules that differ in recipe and rates only, paired differences to the best."""
    families: dict[str, list[str]] = {}
    for name, runs in study.grown.items():
        stages = runs.first.stages
        steps = [f"{stage['shape']} until {stage['until']:g} TFLOP" for stage in stages[:-1]]
        families.setdefault(", ".join([*steps, stages[-1]["shape"]]), []).append(name)
    lines: list[str] = []
    for path, names in families.items():
        if len(names) < 2:
            continue
        budget = min(study.grown[name].budgets[-1] for name in names)
        found = {name: study.grown[name].at(budget) for name in names}
        means = {name: estimate([r.loss for r in runs.values()]).mean for name, runs in found.items()}
        first = min(names, key=lambda name: (-len(found[name]), means[name]))
        pairs = {name: paired(found[name], found[first]) for name in names}
        lines += [
            f"### {path}, {budget / TERA:.2g} TFLOP",
            "",
            "| recipe | loss (seeds) | minus the first, same seeds | p |",
            "|---|---:|---:|---:|",
        ]
        for name, difference in sorted(
            pairs.items(), key=lambda pair: (pair[0] != first, pair[1].mean if pair[1] else 0.0)
        ):
            cells = f"| {name} | {means[name]:.4f} ({len(found[name])}) |"
            if name == first or difference is None:
                lines.append(f"{cells} | |")
            else:
                lines.append(f"{cells} {interval(difference)} ({difference.n}) | {p_value(difference.p)} |")
        lines.append("")
    return lines


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path, help="the experiment's YAML file, which names the ceilings")
    parser.add_argument("results", type=Path, help="folder of runs, or a results.jsonl")
    parser.add_argument("--output", type=Path, help="folder of the tables and figures")
    parser.add_argument(
        "--page", type=Path, help="Markdown page whose tables, between its markers, are replaced"
    )
    given = parser.parse_args()
    try:
        with path_errors():
            experiment = read_experiment(given.config)
            results = collect(given.results) if given.results.is_dir() else read_results(given.results)
            page = given.page.read_text(encoding="utf-8") if given.page else BEGIN + END
            if BEGIN not in page or END not in page:
                raise ConfigError(
                    f"--page {given.page} has no {BEGIN.strip()} and {END.strip()}: add both lines"
                )
    except NexusError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(EXIT_CODE_USER_ERROR)
    study = Study(results)
    output = given.output or (given.results if given.results.is_dir() else given.results.parent)
    output.mkdir(parents=True, exist_ok=True)
    sections = {
        "Loss from scratch": frontier_table(study),
        "Ceilings": ceiling_table(study, experiment.ceilings),
        "Growth": growth_table(study),
        "Recipes": recipe_tables(study),
    }
    text = "".join(
        f"## {title}\n\n" + "\n".join(lines) + "\n\n" for title, lines in sections.items() if lines
    )
    print(text)
    if given.page:
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        given.page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
    else:
        (output / "tables.md").write_text(text, encoding="utf-8")
    drawn = [
        figures.draw_frontier(study, output / "frontier.png"),
        figures.draw_savings(study, output / "recipes.png"),
        figures.draw_ceilings(
            [(c.axis, e[3]) for c in experiment.ceilings if (e := ceiling_at_equal_tokens(study, c))],
            output / "ceilings.png",
        ),
    ]
    print("pictures:", ", ".join(str(path) for path in drawn if path))


if __name__ == "__main__":
    main()

"""One picture of the paths of all runs: U, NOC, R and performance over tokens."""

from collections.abc import Sequence
from pathlib import Path as FilePath

from megatron_nexus.analysis.path import NO_SHIFT_P, Path


def draw_paths(paths: Sequence[Path], file: FilePath) -> None:
    """Draw the paths of one group in one file. Raises OSError."""
    from matplotlib.figure import Figure  # here: half a second that only pictures need

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for path in paths:
        tokens = [point.snapshot.tokens for point in path.points]
        compared = [point.snapshot.comparison for point in path.points]
        curves: tuple[Sequence[float | None], ...] = (
            [c.u for c in compared],
            [c.noc for c in compared],
            [point.r for point in path.points],
            [point.d3 for point in path.points],
        )
        for axes, values in zip(panels.flat, curves, strict=True):
            shown = [(t, v) for t, v in zip(tokens, values, strict=True) if v is not None]
            axes.plot([t for t, _ in shown], [v for _, v in shown], "o-", label=path.run)
    titles = ("U: p-value, base against grown", "NOC: overlap of densities", "radius R", "d3: gain")
    for axes, title in zip(panels.flat, titles, strict=True):
        axes.set_title(title)
        axes.grid(alpha=0.3)
    panels[0, 0].axhline(NO_SHIFT_P, linestyle="--", color="grey", linewidth=1)
    panels[0, 0].set_ylim(0, 1)
    panels[1, 0].legend()
    for axes in panels[1]:
        axes.set_xlabel("tokens")
    figure.savefig(file)

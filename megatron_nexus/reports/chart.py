"""Line charts as inline SVG: small enough for a phone, coloured by the page's style.

A chart is 380 units wide and stands in a grid of as many columns as fit, so its text keeps its size.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 40
MOST_POINTS = 240
"""Most points of a line; of more, means of equal stretches are drawn."""
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """A curve: its name, points, colour by number, dashed from the ninth on; dots show its points."""

    name: str
    points: Points
    colour: int
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """What an axis shows, in which unit, and what its values are divided by."""

    title: str
    unit: str = ""
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


def scaled_axis(title: str, largest: float, units: Sequence[tuple[float, str]]) -> Axis:
    """Return an axis in the largest of `units`, which ascend, that `largest` reaches."""
    reached = [unit for unit in units if largest >= unit[0]] or [units[0]]
    return Axis(title, reached[-1][1], reached[-1][0])


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from `low` to `high`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten, or where fewer than two are within, ones of 1, 2 and 5."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    step = max(1, len(decades) // 5)
    tens = [10.0**power for power in decades[::step] if low <= 10.0**power <= high]
    if len(tens) >= 2:
        return tens
    return [t for power in decades for f in (1, 2, 5) if low <= (t := f * 10.0**power) <= high]


def number(value: float) -> str:
    """Return a number for a label: at most four digits."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}"


def thinned(points: Points) -> Points:
    """Return points, or the means of MOST_POINTS stretches of them."""
    if len(points) <= MOST_POINTS:
        return points
    ends = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    stretches = [points[a:b] for a, b in itertools.pairwise(ends)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]


@dataclass(frozen=True)
class _Scale:
    """From values to places on the page."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.begin + share * (self.end - self.begin), 1)


def line_chart(
    title: str, x: Axis, y: Axis, series: Sequence[Series], marks: Iterable[float] = (), log: bool = False
) -> str:
    """Return a figure of curves, with upright lines at `marks`; `log` has a logarithmic y axis.

    Points that are not finite, or not above 0 on a logarithmic axis, are left out; "" where none is left.
    """
    drawn = []
    for one in series:
        finite = [
            (a, b) for a, b in one.points if math.isfinite(a) and math.isfinite(b) and (b > 0 or not log)
        ]
        if finite:
            drawn.append((one, [(a / x.scale, b / y.scale) for a, b in thinned(finite)]))
    if not drawn:
        return ""
    every = [point for _, points in drawn for point in points]
    across = _Scale(*_span([a for a, _ in every], False), LEFT, WIDTH - RIGHT)
    up = _Scale(*_span([b for _, b in every], log), HEIGHT - BOTTOM, TOP, log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>',
        *_grid(across, up, x, y),
    ]
    for mark in marks:
        if across.low <= mark / x.scale <= across.high:
            at = across(mark / x.scale)
            parts.append(f'<line class="seam" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for one, points in drawn:
        parts += _curve(one, [(across(a), up(b)) for a, b in points], points, x, y)
    return f"<figure>{''.join(parts)}</svg></figure>"


def _span(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.1, high * 1.1)
    if low == high == 0.0:
        return 0.0, 1.0
    margin = (high - low) * 0.04 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> Iterable[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in log_ticks(up.low, up.high) if up.log else ticks(up.low, up.high):
        at = up(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>'
        yield f'<text x="{LEFT - 5}" y="{at + 4}" text-anchor="end">{number(value)}</text>'
    for value in ticks(across.low, across.high):
        at = across(value)
        yield f'<line class="grid" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>'
    place = (TOP + bottom) / 2
    yield f'<text transform="translate(11 {place}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'


def _curve(one: Series, places: Points, points: Points, x: Axis, y: Axis) -> Iterable[str]:
    style = f"line {_style(one)}"
    if len(places) > 1:
        path = " ".join(f"{a},{b}" for a, b in places)
        yield f'<polyline class="{style}" points="{path}"><title>{escape(one.name)}</title></polyline>'
    if one.dots or len(places) == 1:
        for (a, b), (at, value) in zip(places, points, strict=True):
            said = f"{one.name}: {number(value)} at {number(at)} {x.unit or x.title}"
            yield f'<circle class="dot c{one.colour % COLOURS}" cx="{a}" cy="{b}" r="3.5">'
            yield f"<title>{escape(said)}</title></circle>"


def _style(one: Series) -> str:
    return f"c{one.colour % COLOURS}" + (" dashed" if one.colour >= COLOURS else "")


def legend(series: Sequence[Series]) -> str:
    """Return the names of curves with their colours; "" of a single one."""
    seen = {one.name: one for one in series}
    if len(seen) < 2:
        return ""
    items = (f'<span><i class="key {_style(one)}"></i>{escape(name)}</span>' for name, one in seen.items())
    return f'<p class="legend">{"".join(items)}</p>'

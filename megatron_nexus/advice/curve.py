"""The loss curve of a run, with its learning rate and the cost of each token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FIRST_SHARE = 0.35
"""Share of a curve's tokens left out of the fit: no power law describes the beginning of training."""


@dataclass(frozen=True)
class Point:
    """A loss in nats per token, and what had been trained when it was measured.

    `area` is the integral of the learning rate over tokens divided by the peak, in tokens; `rate` the
    learning rate at that step, as a share of the peak.
    """

    tokens: float
    area: float
    rate: float
    loss: float


@dataclass(frozen=True)
class Size:
    """A model as far as its curve is concerned: parameters, FLOPs of a token forward and backward."""

    name: str
    parameters: int
    flops_per_token: int


@dataclass(frozen=True)
class GrownFrom:
    """The growth that a run began with: tokens, area and FLOPs before it, and the size of the base."""

    tokens: float
    area: float
    flops: float
    base: Size


@dataclass(frozen=True)
class Curve:
    """The losses of a run, oldest first; `grown` where it began as a smaller model."""

    name: str
    size: Size
    points: tuple[Point, ...]
    grown: GrownFrom | None = None

    @property
    def last(self) -> Point:
        """The newest loss."""
        return self.points[-1]

    @property
    def fitted(self) -> tuple[Point, ...]:
        """The points that a law is fitted to, where no run of its size is longer."""
        return self.after(FIRST_SHARE * self.last.tokens)

    def after(self, tokens: float) -> tuple[Point, ...]:
        """Return the points from `tokens` on."""
        return tuple(point for point in self.points if point.tokens >= tokens)

    def until(self, tokens: float) -> "Curve":
        """Return the curve with everything after `tokens` hidden."""
        return replace(self, points=tuple(point for point in self.points if point.tokens <= tokens))


def columns(points: Sequence[Point]) -> tuple[Array, Array, Array]:
    """Return areas, rates and losses of points."""
    areas, rates, losses = np.array([(p.area, p.rate, p.loss) for p in points], float).T
    return areas, rates, losses


@dataclass(frozen=True)
class Schedule:
    """A WSD schedule: the share of all tokens in its one decay, of the peak at its end, tokens of warm-up."""

    decay: float = 0.2
    lowest: float = 0.1
    warmup: float = 0.0

    def area(self, tokens: float) -> float:
        """Return the area of a whole run of `tokens`."""
        return tokens * (1.0 - self._lost) - self.warmup / 2.0

    def area_after(self, tokens: float, all_tokens: float) -> float:
        """Return the area of the last `tokens` of a run of `all_tokens`, its decay among them."""
        return tokens - all_tokens * self._lost

    def tokens(self, area: Array) -> Array:
        """Return the tokens of a whole run that has this area."""
        return np.asarray((area + self.warmup / 2.0) / (1.0 - self._lost), float)

    @property
    def _lost(self) -> float:
        return self.decay * (1.0 - self.lowest) / 2.0

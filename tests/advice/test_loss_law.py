"""The law of a loss curve: found again where it holds, its inverse, its error on real curves."""

import numpy as np
import pytest

from megatron_nexus.advice.curve import Curve, Point, Schedule, Size
from megatron_nexus.advice.forecast import Interval
from megatron_nexus.advice.loss_law import fit_law, law_of_size
from megatron_nexus.config.command_line import build
from megatron_nexus.config.schedule import learning_rate

E, B, BETA, G = 2.5, 160.0, 0.4, 0.16
SIZES = {"small": (E, B), "large": (E - 0.4, 1.3 * B)}


def curve_of(name: str, tokens: int, seed: int = 0, noise: float = 0.0, decays: bool = True) -> Curve:
    """Forty losses of the law, with noise, of a run with or without a decay over its last fifth."""
    e, b = SIZES[name]
    rng, points, area = np.random.default_rng(seed), [], 0.0
    for at in np.linspace(tokens / 40, tokens, 40):
        rate = min(1.0, 0.1 + 0.9 * (tokens - at) / (0.2 * tokens)) if decays else 1.0
        area += rate * tokens / 40
        loss = e + b * area**-BETA + G * rate + noise * rng.standard_normal()
        points.append(Point(float(at), area, rate, float(loss)))
    return Curve(name, Size(name, 1000, 6000), tuple(points))


def test_a_law_that_holds_is_found_again() -> None:
    whole = {name: curve_of(name, 1_000_000) for name in SIZES}
    for name, curve in whole.items():
        law = fit_law([curve], 1, 0)
        assert np.allclose(law.area(law.loss(5e7, 0.1), 0.1), 5e7, rtol=1e-5)  # errors and all, draw by draw
        assert np.median(law.beta) == pytest.approx(BETA, abs=0.03)
        assert np.median(law.gain) == pytest.approx(G, abs=0.02)
        # Its inverse, and ten times as many tokens: the e's and b's trade, the curve does not.
        assert np.median(law.area(law.loss(3e5, 1.0), 1.0)) == pytest.approx(3e5, rel=1e-6)
        e, b = SIZES[name]
        assert np.median(law.loss(1e7, 0.1)) == pytest.approx(e + b * 1e7**-BETA + 0.1 * G, abs=0.03)


def test_the_end_of_a_curve_is_in_its_interval_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(20):
        curve = curve_of("small", 1_000_000, seed, noise=0.01)
        law = fit_law([curve.until(500_000)], seed, 0)
        found = Interval.of(law.loss(curve.last.area, curve.last.rate))
        inside += found.low <= curve.last.loss <= found.high
    assert inside >= 18  # 95 % of 20 is 19


def test_without_a_decay_what_a_decay_gains_is_only_known_from_elsewhere() -> None:
    flat = fit_law([curve_of("small", 1_000_000, noise=0.003, decays=False)], 1, 0)
    seen = fit_law([curve_of("small", 1_000_000, noise=0.003)], 1, 0)
    assert np.std(flat.gain) > 2 * np.std(seen.gain)


def test_a_size_between_others_is_between_them_and_less_certain_beyond() -> None:
    names = ("small", "large")
    beta = np.array([BETA])
    laws = {name: fit_law([curve_of(name, 1_000_000)], 1, 0, beta) for name in (*names, "small")}
    laws["middle"] = laws["small"]
    sizes = {"small": 1000, "middle": 1100, "large": 4000}
    inside = law_of_size(laws, sizes, 2000, 1).loss(1e6, 0.1)
    beyond = law_of_size(laws, sizes, 9000, 1).loss(1e6, 0.1)
    ends = sorted(float(np.median(laws[name].loss(1e6, 0.1))) for name in names)
    assert ends[0] - 0.02 <= np.median(inside) <= ends[1] + 0.02
    assert np.ptp(np.quantile(beyond, (0.05, 0.95))) > np.ptp(np.quantile(inside, (0.05, 0.95)))


def test_the_area_of_a_schedule_is_the_sum_of_its_learning_rates() -> None:
    config = build(
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 200, "lr_warmup_iters": 20, "lr": 1.0, "min_lr": 0.1}
    ).optimizer
    rates = [learning_rate(config, step, 1000) for step in range(1, 1001)]
    schedule = Schedule(0.2, 0.1, warmup=20)
    assert schedule.area(1000) == pytest.approx(sum(rates), abs=1.5)
    assert schedule.area_after(500, 1000) == pytest.approx(sum(rates[500:]), abs=1.5)
    assert schedule.tokens(np.array([schedule.area(1000)]))[0] == pytest.approx(1000)

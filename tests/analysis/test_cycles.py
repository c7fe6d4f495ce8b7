"""Cycles: exact p-values against simulation, F tests against numpy's least squares, nulls that hold."""

import numpy as np
import pytest
import scipy

from megatron_nexus.analysis.cycles import Cycle, FisherG, fisher_g, fisher_p, fit_cycle, peak_share
from megatron_nexus.analysis.scaling_law import ScalingLaw, fit_scaling_law

TIMES = [1e9 * i for i in range(16)]


@pytest.mark.parametrize(("ordinates", "g"), [(5, 0.5), (5, 0.8), (10, 0.35), (49, 0.12)])
def test_fisher_s_p_is_exact(ordinates: int, g: float) -> None:
    noise = np.random.default_rng(1).standard_normal((2 * ordinates + 1, 40_000))
    share = np.mean(peak_share(noise) >= g)
    # Four standard errors of a share of 40,000 draws.
    assert fisher_p(g, ordinates) == pytest.approx(share, abs=4 * np.sqrt(0.25 / 40_000))


def test_fisher_s_p_is_a_distribution() -> None:
    for ordinates in (2, 5, 49, 300):
        assert fisher_p(1.0, ordinates) == 0.0
        # Not even 300 alternating terms lose a digit.
        assert fisher_p(1.0 / ordinates, ordinates) == pytest.approx(1.0, abs=1e-12)
    values = [fisher_p(g, 40) for g in np.linspace(0.03, 0.9, 30)]
    assert values == sorted(values, reverse=True) and 0.0 <= min(values) <= max(values) <= 1.0


@pytest.mark.law  # and a second of import, as another below
def test_the_f_tests_are_those_of_least_squares() -> None:
    rng = np.random.default_rng(2)
    t = np.arange(16.0)
    y = 0.3 + 0.02 * t + 0.2 * np.cos(2 * np.pi * 3 * t / 16) + 0.1 * rng.standard_normal(16)
    found = fit_cycle(TIMES, list(y), seed=0)
    assert isinstance(found, Cycle)

    def rest(*columns: np.ndarray) -> float:
        design = np.stack([np.ones(16), *columns], 1)
        return float(np.linalg.lstsq(design, y, rcond=None)[1][0])

    wave = np.cos(2 * np.pi * 3 * t / 16), np.sin(2 * np.pi * 3 * t / 16)
    full = rest(t, *wave)
    assert found.period == pytest.approx(16e9 / 3)
    f = (rest(t) - full) / 2 / (full / 12)
    assert found.p_known_period == pytest.approx(scipy.stats.f.sf(f, 2, 12), rel=1e-6)
    constant = float(np.square(y - y.mean()).sum())
    f_all = (constant - full) / 3 / (full / 12)
    assert found.p_constant == pytest.approx(scipy.stats.f.sf(f_all, 3, 12), rel=1e-6)
    assert found.r_squared == pytest.approx(1 - full / constant, rel=1e-9)
    low, high = found.amplitude_95
    assert low <= 0.2 <= high


@pytest.mark.law
def test_a_cycle_is_found_and_noise_and_walks_are_not_taken_for_one() -> None:
    rng = np.random.default_rng(4)
    wave = np.sin(2 * np.pi * 4 * np.arange(16) / 16) + 0.2 * rng.standard_normal(16)
    found, peak = fit_cycle(TIMES, list(wave), 0), fisher_g(TIMES, list(wave), 0)
    assert isinstance(found, Cycle) and isinstance(peak, FisherG)
    assert "a cycle beyond white noise and a random walk" in str(found)
    assert found.cycles == peak.cycles == 4
    assert max(peak.p_exact, peak.p_detrended.white_noise, peak.p_detrended.random_walk) < 0.01
    draws = 200
    for walk in (False, True):
        noise = rng.standard_normal((draws, 16))
        series = noise.cumsum(1) if walk else noise
        fits = [fit_cycle(TIMES, list(row), 0) for row in series]
        fits = [fit for fit in fits if isinstance(fit, Cycle)]
        chosen = [fit.p_chosen.random_walk if walk else fit.p_chosen.white_noise for fit in fits]
        # 5 % of 200, and three standard errors.
        assert np.mean(np.array(chosen) < 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)
        known = np.mean([fit.p_known_period < 0.05 for fit in fits])
        assert known > 0.12, "the test that does not know of the choice finds cycles everywhere"


@pytest.mark.parametrize(
    ("times", "series", "expected"),
    [
        (TIMES[:5], [0.1, 0.2, 0.1, 0.3, 0.2], "5 points, and it needs 6"),
        (TIMES, [0.01 * i for i in range(16)], "16 points that lie on a line"),
        (TIMES, [0.0] * 16, "16 points that lie on a line"),
    ],
)
def test_what_cannot_be_fitted_is_said(times: list[float], series: list[float], expected: str) -> None:
    for fit in (fit_cycle(times, series, 0), fisher_g(times, series, 0)):
        assert isinstance(fit, str) and expected in fit


def test_fisher_s_g_needs_even_steps_and_the_harmonic_does_not() -> None:
    times = [t + (3e8 if i == 5 else 0.0) for i, t in enumerate(TIMES)]
    series = list(np.random.default_rng(0).standard_normal(16))
    assert "not evenly spaced" in str(fisher_g(times, series, 0))
    assert isinstance(fit_cycle(times, series, 0), Cycle)


@pytest.mark.law
def test_two_drifting_series_are_no_law() -> None:
    rng = np.random.default_rng(8)
    t = np.arange(20.0)
    radii = np.exp(-3 + 0.1 * t + 0.02 * rng.standard_normal(20))
    drift = fit_scaling_law(
        list(zip(t, radii, 3 - 0.01 * t + 0.01 * rng.standard_normal(20), strict=True)), 0
    )
    assert isinstance(drift, ScalingLaw)
    assert drift.p_constant < 1e-3 and drift.p_trend > 0.05
    assert "no evidence of a law beyond a common trend" in str(drift)
    radii = np.exp(-3 + rng.standard_normal(20))
    law = fit_scaling_law(list(zip(t, radii, 2.0 - 0.1 * np.abs(np.log(radii)), strict=True)), 0)
    assert isinstance(law, ScalingLaw) and law.alpha == pytest.approx(-0.1)
    assert "a slope beyond chance and a trend" in str(law) and "is outside the interval" in str(law)

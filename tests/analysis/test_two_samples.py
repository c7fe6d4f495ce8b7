"""U, AUC and NOC against scipy's direct sums, and against the populations that samples were drawn from."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde, mannwhitneyu, norm

from megatron_nexus.analysis.two_samples import compare, overlap

pytestmark = pytest.mark.law


def direct_overlap(one: np.ndarray, other: np.ndarray) -> float:
    """The integral of the lesser density, by scipy's KDE on a fine grid."""
    widths = [x.std(ddof=1) * len(x) ** -0.2 for x in (one, other)]
    both = np.concatenate([one, other])
    grid = np.linspace(both.min() - 6 * max(widths), both.max() + 6 * max(widths), 6000)
    lesser = np.minimum(gaussian_kde(one)(grid), gaussian_kde(other)(grid))
    return float(lesser.sum() * (grid[1] - grid[0]))


@pytest.mark.parametrize("case", ["same", "shifted", "narrow", "zeros", "heavy"])
def test_a_comparison_of_whole_samples_is_that_of_scipy(case: str) -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal(700) * 0.02
    grown = {
        "same": rng.standard_normal(500) * 0.02,
        "shifted": rng.standard_normal(500) * 0.02 + 0.01,
        "narrow": rng.standard_normal(500) * 0.001,
        "zeros": np.where(rng.random(500) < 0.5, 0.0, rng.standard_normal(500) * 0.02),
        "heavy": rng.standard_t(2, 500) * 0.01,
    }[case]
    found = compare(base, grown)
    expected = mannwhitneyu(base, grown, alternative="two-sided")
    assert found.u == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.auc == pytest.approx(1 - expected.statistic / (700 * 500), abs=1e-12)
    # Linear binning on a grid of an eighth of a bandwidth.
    assert found.noc == pytest.approx(direct_overlap(base, grown), abs=1e-3)


def test_auc_counts_pairs_and_ties_by_half() -> None:
    base, grown = np.array([0.0, 1.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0])
    pairs = [(g > b) + 0.5 * (g == b) for g in grown for b in base]
    assert compare(base, grown).auc == pytest.approx(np.mean(pairs), abs=1e-12)


def test_a_constant_side_has_no_density_and_equal_sides_no_shift() -> None:
    zeros, normal = np.zeros(50), np.random.default_rng(0).standard_normal(80)
    assert compare(normal, zeros).noc is None and compare(normal, zeros).noc_error is None
    same = compare(zeros, zeros)
    assert (same.u, same.auc, same.noc) == (1.0, 0.5, None)


def test_samples_estimate_the_population_within_their_stated_errors() -> None:
    rng = np.random.default_rng(5)
    base, grown = rng.standard_normal(40_000), 0.7 * rng.standard_normal(40_000) + 0.3
    true_auc = norm.cdf(0.3 / np.hypot(1.0, 0.7))
    hits, nocs, errors = 0, [], []
    for _ in range(60):
        found = compare(rng.choice(base, 1_500, replace=False), rng.choice(grown, 1_500, replace=False))
        hits += abs(found.auc - true_auc) <= found.auc_error
        nocs.append(found.noc)
        errors.append(found.noc_error)
    # The bound holds for any distribution, so it covers at least 95 %; of 60, 53 with a chance of .998.
    assert hits >= 53
    assert np.std(nocs) == pytest.approx(np.mean(errors), rel=0.35), "a deviation of 60 is known to 9 %"
    whole, _ = overlap(base, grown)
    # The density of a smaller sample is smoothed more: a bias below one hundredth.
    assert np.mean(nocs) == pytest.approx(whole, abs=0.01)


def test_without_a_shift_u_is_uniform_noise() -> None:
    rng = np.random.default_rng(6)
    p = [compare(rng.standard_normal(300), rng.standard_normal(300)).u for _ in range(200)]
    # Kolmogorov-Smirnov at 1 %: 1.63 / sqrt(200).
    assert np.abs(np.sort(p) - (np.arange(200) + 0.5) / 200).max() < 0.115

"""The analysis on the paper's own tables: what they give, and what they do not."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_nexus.analysis.components import Components, grassmann, principal_components
from megatron_nexus.analysis.cycles import Cycle, FisherG
from megatron_nexus.analysis.path import Path, Snapshot, make_path
from megatron_nexus.analysis.report import make_report, report_lines
from megatron_nexus.analysis.scaling_law import PAPER_ALPHA, ScalingLaw
from megatron_nexus.analysis.two_samples import Comparison
from tests.support.paper_tables import EXPLAINED, GROWTHS, INITS, LOADINGS, Series

SEED = 1234


def path_of(name: str, u: Series, noc: Series, last: Series, billions: int, loss: bool = False) -> Path:
    snapshots = [
        Snapshot(
            step,
            step * billions * 10**9,
            Comparison(1, 1, p, 0.5, 0.0, overlap, None),
            value if loss else None,
            -value if loss else value,
        )
        for step, (p, overlap, value) in enumerate(zip(u, noc, last, strict=True))
    ]
    return make_path(name, "all", snapshots)


@pytest.fixture(scope="module")
def growths() -> list[Path]:
    return [path_of(name, *columns, billions=10) for name, columns in GROWTHS.items()]


def init_report(name: str) -> tuple[Cycle, FisherG, ScalingLaw]:
    (report,) = make_report([path_of(name, *INITS[name], billions=3, loss=True)], SEED)
    fitted = report.paths[0]
    assert isinstance(fitted.cycle, Cycle) and isinstance(fitted.fisher, FisherG)
    assert isinstance(fitted.law, ScalingLaw)
    return fitted.cycle, fitted.fisher, fitted.law


def test_table_3_gives_the_loadings_of_table_5(growths: list[Path]) -> None:
    found = principal_components([row for path in growths for row in path.changes.values()], SEED)
    assert isinstance(found, Components)
    assert found.n == 18, "without the three points at 0 billion tokens"
    # Printed to three decimals.
    assert np.abs(np.array(found.loadings[:2]) - LOADINGS).max() < 5e-4
    assert round(sum(found.explained[:2]), 4) == EXPLAINED
    assert found.p_independent < 0.05, "three independent columns explain less"
    low, high = found.first_two_95
    assert low < EXPLAINED < high


def test_five_rows_have_an_interval_though_some_resamples_do_not_vary() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 3)).tolist()
    found = principal_components(rows, SEED)
    assert isinstance(found, Components) and found.n == 5
    low, high = found.first_two_95
    assert 0.6 < low < sum(found.explained[:2]) < high <= 1.0 + 1e-12


def test_the_radius_is_that_of_the_relative_changes() -> None:
    u, noc, _ = (np.array(column) for column in INITS["zero"])
    radii = [point.r for point in path_of("zero", *INITS["zero"], billions=3).points]
    expected = np.sqrt((u / u[0] - 1) ** 2 + (noc / noc[0] - 1) ** 2)
    assert radii == pytest.approx(expected, abs=1e-15)


def test_the_harmonic_of_eleven_points_is_not_significant() -> None:
    cycle, fisher, _ = init_report("zero")
    assert (cycle.n, cycle.periods) == (11, 5)
    assert round(cycle.p_known_period, 2) == 0.08
    assert 0.13 < cycle.p_explained.white_noise < 0.18, "white noise reaches this share in 15 % of draws"
    assert cycle.p_chosen.white_noise > 0.2 and fisher.p_detrended.white_noise > 0.05
    assert "no evidence of a cycle" in str(cycle) and "no evidence of a cycle" in str(fisher)
    low, high = cycle.amplitude_95
    assert low == 0.0 < cycle.amplitude < high


def test_one_bend_over_the_whole_series_is_not_called_a_cycle() -> None:
    cycle, fisher, _ = init_report("noise 10 %")
    assert cycle.cycles == fisher.cycles == 1 and cycle.period == pytest.approx(33e9)
    assert cycle.p_chosen.white_noise < 0.01, "though white noise does not do that"
    assert "not identifiable as a cycle" in str(cycle) and "not identifiable as a cycle" in str(fisher)


@pytest.mark.parametrize("init", INITS)
def test_the_scaling_law_has_the_opposite_slope_in_table_4(init: str) -> None:
    law = init_report(init)[2]
    assert law.n == 10
    assert law.alpha > 0.0 > PAPER_ALPHA
    inside = init == "noise 10 %"
    assert (law.alpha_95[0] < PAPER_ALPHA) == inside, "its interval is wide enough for any slope"
    assert min(law.p_constant, law.p_shuffled) > 0.2 and "no evidence of a law" in str(law)


def test_the_slope_of_the_zero_path_is_that_of_numpy_s_polyfit() -> None:
    law = init_report("zero")[2]
    u, noc, loss = (np.array(column) for column in INITS["zero"])
    x = np.abs(np.log(np.hypot(u / u[0] - 1, noc / noc[0] - 1)[1:]))
    assert (law.alpha, law.beta) == pytest.approx(np.polyfit(x, loss[1:], 1), rel=1e-9)
    assert law.alpha == pytest.approx(0.0748, abs=1e-4)


def test_u_of_the_zero_path_detects_no_shift_and_of_noise_does() -> None:
    notes = {name: path_of(name, *columns, billions=3).notes for name, columns in INITS.items()}
    assert any("at all 11 checkpoints" in note for note in notes["zero"])
    assert any("at 3 of 11 checkpoints" in note for note in notes["noise 10 %"])


def test_distances_grow_from_the_reference_and_obey_their_axioms(growths: list[Path]) -> None:
    (report,) = make_report(growths, SEED)
    components = report.components
    assert isinstance(components, Components)
    zero = components.state((0.0, 0.0, 0.0))
    states = [components.state(row) for path in growths for row in path.changes.values()]
    for fitted in report.paths:
        assert len(fitted.distances) == 6, "the reference itself has none"
    for one, other in pairwise(states):
        assert grassmann(one, one) < 1e-7 < grassmann(one, other)
        assert grassmann(one, other) == pytest.approx(grassmann(other, one), rel=1e-9)
        assert grassmann(one, zero) <= grassmann(one, other) + grassmann(other, zero) + 1e-12
    # By the formula: principal angles from singular values of products of orthonormal bases.
    bases = [np.linalg.qr(np.vstack([np.eye(2), z]))[0] for z in (states[0], zero)]
    angles = np.arccos(np.clip(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False), -1, 1))
    assert grassmann(states[0], zero) == pytest.approx(np.linalg.norm(angles), abs=1e-6)


def test_the_report_says_what_cannot_be_computed() -> None:
    short = [path_of("short", *(column[:3] for column in GROWTHS["240-300M"]), billions=10)]
    text = "\n".join(report_lines(make_report(short, SEED)))
    assert "harmonic: 3 points, and it needs 6" in text
    assert "Fisher's g: 3 points, and it needs 6" in text
    assert "scaling law: 0 points with R > 0 and a validation loss, 5 needed" in text
    assert "principal components: 2 points" in text
    assert "no fit could be made" in text
    assert "-0.1624" in text, "d1 at 10 billion tokens is computed all the same"

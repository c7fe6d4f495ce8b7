"""The mesh: what it asks of the system, and how long its ranks wait."""

import pytest

from tests.support.paths import TESTS
from tests.support.ranks import run_ranks


@pytest.mark.law
def test_ranks_have_more_connections_than_files_are_open_at_first() -> None:
    """Each group connects its members with each other: 256 ranks pass the limit of 1024."""
    run_ranks(4, TESTS / "parallel" / "mesh_worker.py")


@pytest.mark.law
def test_ranks_wait_long_for_the_first_step_and_less_in_later_ones() -> None:
    """Beside the model, for a checkpoint or an evaluation, they wait as long as before."""
    run_ranks(2, TESTS / "parallel" / "timeout_worker.py")

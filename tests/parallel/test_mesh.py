"""The mesh: what it asks of the system."""

import pytest

from tests.support.paths import TESTS
from tests.support.ranks import run_ranks


@pytest.mark.law
def test_ranks_have_more_connections_than_files_are_open_at_first() -> None:
    """Each group connects its members with each other: 256 ranks pass the limit of 1024."""
    run_ranks(4, TESTS / "parallel" / "mesh_worker.py")

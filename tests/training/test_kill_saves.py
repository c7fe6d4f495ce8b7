"""Law: whenever a run is killed, it resumes, and nothing is lost that it had reported saved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY, TESTS
from tests.support.waiting import TIMEOUT_S


@pytest.mark.law
def test_a_run_that_is_killed_around_its_saves_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(TESTS / "training" / "killed_saves_worker.py"),
            str(tmp_path / "runs"),
            "--kills",
            "6",
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "6 kills: always resumed" in done.stdout

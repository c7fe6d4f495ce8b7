"""Law: whenever a run is killed, it resumes, and nothing is lost that it had reported saved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S, REPOSITORY, TESTS


@pytest.mark.slow
def test_a_run_that_is_killed_around_its_saves_loses_nothing(tmp_path: Path) -> None:
    paths = [str(REPOSITORY), str(TESTS)]
    done = subprocess.run(
        [sys.executable, str(TESTS / "training" / "kill_saves.py"), str(tmp_path / "runs"), "--kills", "6"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "6 kills: always resumed" in done.stdout

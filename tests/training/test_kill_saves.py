"""Law: whenever a run is killed, it resumes, and nothing is lost that it had reported saved."""

from pathlib import Path

import pytest

from tests.support.cli import WARM, ended
from tests.support.paths import TESTS
from tests.support.subprocesses import Spawn


@pytest.mark.law
def test_a_run_that_is_killed_around_its_saves_loses_nothing(spawn: Spawn, tmp_path: Path) -> None:
    worker = str(TESTS / "training" / "killed_saves_worker.py")
    program = spawn([*WARM, worker, str(tmp_path / "runs"), "--kills", "6"], tmp_path)
    code, output = ended(program)
    assert code == 0, output[-6000:]
    assert "6 kills: always resumed" in output

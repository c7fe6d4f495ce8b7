"""A billion documents open at once, and cost no memory that is not touched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


@pytest.mark.slow
def test_a_billion_documents_open_in_no_time_and_cost_no_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "open_index.py"), str(tmp_path)],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["documents"] == 10**9
    # 2 ms and 0.25 MB on a local disk; a byte a document would be 1 GB.
    assert found["open_s"] < 2.0
    assert found["open_bytes"] < 16e6
    assert found["bytes_after_samples"] < 64e6
    assert list(tmp_path.iterdir()) == []

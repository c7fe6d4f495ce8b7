"""The GPU kit runs shrunk on a CPU, every stage, so that it works on the day that somebody has a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


@pytest.mark.slow
def test_every_stage_of_the_gpu_kit_passes_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_kit.py", str(tmp_path), "--budget", "1000"],
        cwd=REPOSITORY,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    records = [json.loads(line) for line in (tmp_path / "kit.jsonl").read_text().splitlines()]
    assert {record["stage"]: record["error"] for record in records if record["error"]} == {}
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(record["rows"] for record in records) and len(records) == 11
    assert "FAILED" not in (tmp_path / "table.md").read_text()

"""The GPU kit runs shrunk on a CPU, every stage, so that it works on the day that somebody has a GPU."""

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_nexus.config.command_line import build
from megatron_nexus.config.devices import DEVICES
from megatron_nexus.planner.step_time import step_time
from tests.support.paths import REPOSITORY
from tests.support.warm_programs import warm_bin, warm_path


@pytest.mark.slow
def test_every_stage_of_the_gpu_kit_passes_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [warm_bin() / "python", "benchmarks/gpu_kit.py", str(tmp_path), "--budget", "1000"],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": warm_path(), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    records = [json.loads(line) for line in (tmp_path / "kit.jsonl").read_text().splitlines()]
    assert {record["stage"]: record["error"] for record in records if record["error"]} == {}
    assert done.returncode == 0, done.stdout[-4000:]
    assert all(record["rows"] for record in records) and len(records) == 11
    assert "FAILED" not in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_predictions_of_the_kit_are_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a device that is not there, and none on this CPU."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    stage = importlib.import_module("gpu_stage")
    h100, config = DEVICES["h100"], build({"preset": "nexusformer-240m"})
    assert stage.predicted_model_rate(config) is None
    whole = stage.predicted_step_rate(config, h100)
    assert whole == step_time(config, 1, h100).tokens_per_s
    assert whole < stage.predicted_model_rate(config, h100) < 1.1 * whole
    assert stage.predicted_product_rate(8192, 8192, 8192, h100) == pytest.approx(
        h100.gemm * h100.bf16, rel=0.03
    )


HANGS = """
import sys
sys.path.insert(0, "")
import gpu_kit
from gpu_stage import Row
COMMAND = "import subprocess, time; subprocess.Popen(['sleep', '614.5']); time.sleep(614.5)"
def stage(kit):
    yield Row("before it hangs", 1.0)
    kit.run("-c", COMMAND)
gpu_kit.STAGES["env"] = stage
sys.exit(gpu_kit.main())
"""


@pytest.mark.slow
def test_a_stage_that_hangs_is_cut_off_with_what_it_runs_when_the_budget_is_spent(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    done = subprocess.run(
        [
            warm_bin() / "python",
            tmp_path / "hangs.py",
            str(tmp_path),
            "--only",
            "env,maths",
            "--budget",
            "11",
        ],
        cwd=REPOSITORY / "benchmarks",
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert not [words for words in map(_words, Path("/proc").glob("[0-9]*/cmdline")) if b"614.5" in words]
    (record,) = (json.loads(line) for line in (tmp_path / "kit.jsonl").read_text().splitlines())
    assert [row["name"] for row in record["rows"]] == ["before it hangs"]
    assert "in stage" in record["error"]
    table = (tmp_path / "table.md").read_text()
    assert "| env | before it hangs | 1 " in table and "cut off: the budget is spent" in table


def _words(cmdline: Path) -> bytes:
    try:
        return cmdline.read_bytes()
    except OSError:  # over meanwhile
        return b""

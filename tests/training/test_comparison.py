"""Runs compared: names that differ, a table of how they begin and end, a picture."""

import json
from pathlib import Path

import pytest

from megatron_nexus.errors import ConfigError
from megatron_nexus.training.comparison import comparison_table, plot_runs, read_runs
from megatron_nexus.training.metrics import METRICS_FILE


def run_of(folder: Path, first: int, losses: list[float]) -> Path:
    folder.mkdir(parents=True)
    records = [{"step": first + i, "loss": loss} for i, loss in enumerate(losses)]
    last = {"step": first + len(losses) - 1, "name": "validation", "validation_loss": losses[-1] + 0.5}
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in [*records, last]))
    return folder


def test_runs_are_told_apart_tabled_and_drawn(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / "a" / "run", 1, [4.0, 3.0]), run_of(tmp_path / "b" / "run", 3, [3.0, 2.5])]
    runs = read_runs(folders)
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert list(comparison_table(runs))[2:] == [
        "| a/run | 1 to 2 | 4.000000 | 3.000000 | 3.000000 | 3.5000 |",
        "| b/run | 3 to 4 | 3.000000 | 2.500000 | 2.500000 | 3.0000 |",
    ]
    alike = read_runs([*folders, run_of(tmp_path / "c" / "run", 3, [3.0])])
    plot_runs(alike, tmp_path / "pictures" / "losses.png", "three, of which two begin together")
    assert (tmp_path / "pictures" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_run_is_refused_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = run_of(tmp_path / "started", 1, [1.0])
    (empty / METRICS_FILE).write_text("")
    with pytest.raises(ConfigError) as caught:
        read_runs([tmp_path / "empty", empty])
    assert [problem.split()[-1] for problem in caught.value.problems] == ["run", "trained"]
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([empty, empty])
    with pytest.raises(ConfigError, match=r"losses\.nothing"):
        plot_runs(read_runs([run_of(tmp_path / "c", 1, [1.0])]), tmp_path / "losses.nothing", "")

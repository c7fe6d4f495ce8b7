"""The verb `analyze` on grown runs: the same numbers at every topology, bad input answered."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.cli.analyze import run
from megatron_nexus.errors import CheckpointError, ConfigError, NexusError
from megatron_nexus.training.metrics import METRICS_FILE
from tests.support import checkpoints

pytestmark = pytest.mark.slow  # the import of scipy.stats, too

STEPS = range(checkpoints.STEP + 1, checkpoints.STEP + 8)
SIZES = {"nexus_m": 21, "nexus_a": 30}


def write_run(root: Path, grown: Path, config: object, tp: int) -> None:
    """A run that saved after each of STEPS since its growth, with a loss of each."""
    lineage = read_manifest(grown).lineage
    for step in STEPS:
        checkpoints.write_checkpoint(root, config, tp, seed=step, step=step, lineage=lineage)
    lines = [
        json.dumps({"name": "validation", "step": step, "validation_loss": 3.0 - 0.01 * step, "tasks": None})
        for step in STEPS
    ]
    (root / METRICS_FILE).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a run of a growth of it, by one rank."""
    root, config = tmp_path_factory.mktemp("analyze"), checkpoints.configure()
    checkpoints.write_checkpoint(root / "base", config)
    loss = {"name": "validation", "step": checkpoints.STEP, "validation_loss": 2.7}
    (root / "base" / METRICS_FILE).write_text(json.dumps(loss) + "\n")
    grow_run(root, "one", 1, 1)
    return root


def grow_run(root: Path, name: str, tp: int, pp: int) -> None:
    """Grow the base and write the run that follows, always with the same weights."""
    base, config = root / "base" / f"iter_{checkpoints.STEP:07d}", checkpoints.configure()
    made, after = checkpoints.grow(base, root / name, config, SIZES, tp, pp, init="out_rand")
    write_run(root / name, made, after, tp)


def analyze(folder: Path, *words: str) -> dict:
    run([*words, "--output", str(folder / "found.json")])
    return json.loads((folder / "found.json").read_text())


def test_two_topologies_give_the_same_numbers_and_runs_are_pooled(
    folder: Path, console: pytest.CaptureFixture[str]
) -> None:
    words = ["--samples", "40", "--seed", "3"]
    grow_run(folder, "four", 2, 2)
    one, four = (analyze(folder, str(folder / name), *words)["groups"] for name in ("one", "four"))
    assert json.dumps(one).replace(str(folder / "one"), "RUN") == json.dumps(four).replace(
        str(folder / "four"), "RUN"
    )
    picture = ["--layers", "1", "--plot", str(folder / "a.png")]
    both = analyze(folder, str(folder / "one"), str(folder / "four"), *words, *picture)
    whole = both["groups"][0]
    assert whole["components"]["n"] == 2 * len(STEPS), "without the references"
    assert (folder / "a.png").stat().st_size > 10_000
    text = console.readouterr().out
    assert "nexus_m 15 -> 21, nexus_a 19 -> 30 (--init out_rand) at step 40" in text
    assert re.search(r"\d+ fits of all groups.*: \d+ with p < 0.05, [\d.]+ expected", text)


def test_whole_samples_give_scipy_s_numbers(folder: Path) -> None:
    found = analyze(folder, str(folder / "one"), "--layers", "0")
    groups = {group["group"]: group["paths"][0]["path"] for group in found["groups"]}
    points = groups["layers.0.attention.q.w_d"]["points"]
    assert [point["snapshot"]["step"] for point in points] == [checkpoints.STEP, *STEPS]
    us = []
    for point in points:
        step = point["snapshot"]["step"]
        held = checkpoints.tensors(folder / "one" / f"iter_{step:07d}")
        w_d = held["layers.0.attention.q.w_d"].astype(float)
        us.append(mannwhitneyu(w_d[:, :19].ravel(), w_d[:, 19:].ravel()).pvalue)
        assert point["snapshot"]["comparison"]["u"] == pytest.approx(us[-1], rel=1e-9)
        assert point["d1"] == pytest.approx(us[-1] / us[0] - 1, rel=1e-9, abs=1e-12)
        # The loss at the growth is the parent's, which computed the same.
        assert point["d3"] == pytest.approx((2.7 - point["snapshot"]["loss"]) / 2.7, abs=1e-12)
        assert point["r"] == pytest.approx(np.hypot(point["d1"], point["d2"]), abs=1e-12)


def test_what_is_zero_at_first_has_its_reference_later(folder: Path) -> None:
    # `out_rand` writes zeros where units of M are written: no density at the growth itself.
    found = analyze(folder, str(folder / "one"), "--layers", "1")
    groups = {group["group"]: group["paths"][0]["path"] for group in found["groups"]}
    path = groups["attention.q.w_m"]
    assert path["points"][0]["snapshot"]["step"] == STEPS[0]
    assert f"the reference is step {STEPS[0]}" in path["notes"][0]
    assert not any("layer 0" in name or name.startswith("layers.0") for name in groups)
    whole = analyze(folder, str(folder / "one"), "--layers", "1", "--compare-with", "whole")
    whole = whole["groups"]
    path = next(g for g in whole if g["group"] == "attention.q.w_m")["paths"][0]["path"]
    assert path["points"][0]["snapshot"]["step"] == checkpoints.STEP


def test_task_accuracies_are_performance_where_there_are_any(folder: Path, tmp_path: Path) -> None:
    name = tmp_path / "run"
    name.symlink_to(folder / "one")
    metrics = folder / "one" / METRICS_FILE
    before = metrics.read_text()
    scores = [
        json.dumps({"step": s, "tasks": {"a": {"acc": 0.25}, "b": {"acc": 0.01 * s}}, "seconds": 1.0})
        for s in STEPS
    ]
    metrics.write_text(before + "\n".join(scores) + "\n")
    try:
        found = analyze(folder, str(name), "--samples", "40", "--layers", "0")
        assert found["runs"][0]["performance"] == "tasks"
        path = found["groups"][0]["paths"][0]["path"]
        first, last = ((0.25 + 0.01 * STEPS[i]) / 2 for i in (0, -1))
        assert path["points"][-1]["d3"] == pytest.approx(last / first - 1)
        assert any(f"d3 is relative to step {STEPS[0]}" in note for note in path["notes"])
        asked = analyze(folder, str(name), "--performance", "validation", "--layers", "0")
        assert asked["runs"][0]["performance"] == "validation"
    finally:
        metrics.write_text(before)


def test_checkpoints_that_are_not_whole_are_named_and_left_out(
    folder: Path, tmp_path: Path, console: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "one", tmp_path / "run")
    broken = tmp_path / "run" / f"iter_{STEPS[2]:07d}"
    (broken / "manifest.json").unlink()
    found = analyze(tmp_path, str(tmp_path / "run"), "--samples", "40", "--layers", "0")
    points = found["groups"][0]["paths"][0]["path"]["points"]
    assert [point["snapshot"]["step"] for point in points] == [
        checkpoints.STEP,
        *(step for step in STEPS if step != STEPS[2]),
    ]
    assert f"left out, as they are not whole: {broken.name}" in console.readouterr().out


def test_weights_that_are_not_finite_are_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = CheckpointReader.read_box
    monkeypatch.setattr(CheckpointReader, "read_box", lambda *words: real(*words) * np.float32("nan"))
    with pytest.raises(CheckpointError, match="weights are not finite: nexus inspect --verify names"):
        run([str(folder / "one")])


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("base", ConfigError, "base has never grown"),
        ("nowhere", CheckpointError, "nowhere: no such folder"),
        ("one/iter_0000040", ConfigError, "is one checkpoint: give the folder of its run"),
        ("one one", ConfigError, "one is given twice"),
        ("one --growth 2", ConfigError, "--growth 2: one has grown 1 times: give at most that"),
        ("one --layers 0,7", ConfigError, "--layers 7: one has layers 0 to 1"),
        ("one --layers x", ConfigError, "--layers"),
        ("one --samples 0", ConfigError, "--samples"),
        ("one --performance web", ConfigError, "--performance web: the metrics of one have validation"),
        ("one --output no/such.json", ConfigError, "--output no/such.json: its folder does not exist"),
        ("one --plot growth", ConfigError, "--plot growth must end in one of .png"),
        ("one --compare-with old", ConfigError, "--compare-with"),
    ],
)
def test_bad_input_is_answered_at_once(
    words: str, kind: type[NexusError], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(kind, match=re.escape(message)):
        run(words.split())


def test_without_scipy_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("needs scipy, not installed here: pip install 'scipy>=")):
        run([str(folder / "one")])

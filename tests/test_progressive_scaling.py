"""The experiment of examples/progressive_scaling: its cells resume, its intervals cover."""

import json
import random
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.errors import ConfigError
from tests.support.subprocesses import WARM_PYTHON, Spawn

EXAMPLE = Path(__file__).parents[1] / "examples" / "progressive_scaling"
CONFIG = """
train:
  {data-path: corpus, split: "8,2", vocab-size: 97, seq-length: 16, global-batch-size: 4, micro-batch-size: 4,
   hidden-size: 16, num-attention-heads: 2, kv-channels: 8, ffn-hidden-size: 24, nexus-m: 20, nexus-a: 24,
   eval-interval: 0, eval-iters: 1}
shapes: {l1: {num-layers: 1}, l2: {num-layers: 2}}
warmup_steps: 1
decay_share: 0.25
min_lr_share: 0.1
schedules:
  - {name: scratch, stages: [{shape: l1}], lrs: [0.004], steps: [12], seeds: [1]}
  - name: grown
    stages: [{shape: l1, lr: 0.004, until: 0.00001}, {shape: l2, lr: 0.002, grow: depth_init=stack}]
    steps: [12]
    seeds: [1]
"""


@pytest.fixture
def analysis(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the example, which is not a package."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import analysis

    yield analysis
    for name in set(sys.modules) - known:
        if str(EXAMPLE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("vocab-size: 97", "vocab-sizes: 97", ["shape l1", "unknown flag --vocab-sizes"]),
        ("shape: l2", "shape: l3", ["grown", "shape l3 is not among shapes"]),
        ("nexus-m: 20", "nexus-m: twenty", ["shape l1", "--nexus-m"]),
        ("depth_init=stack", "depth_init=stak", ["grown", "stak"]),
        ("{num-layers: 2}", "{num-layers: 2, nexus-m: 18}", ["grown", "--nexus-m 18", "20"]),
        ("until: 0.00001", "untill: 0.00001", ["grown: a stage", "untill is not known"]),
        ("until: 0.00001", "until: soon", ["grown: a stage: until 'soon' is not a number"]),
        ("    seeds: [1]\n", "", ["an entry of schedules has no seeds: add it"]),
        ("lr: 0.002, ", "", ["grown: a stage has no lr: add it"]),
        ("warmup_steps: 1", "warmup: 1", ["warmup is not known", "warmup_steps is missing"]),
    ],
)
def test_a_wrong_entry_is_one_error_that_names_it(
    old: str, new: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from experiment import read_experiment

    path = tmp_path / "wrong.yaml"
    path.write_text(CONFIG.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        read_experiment(path)
    text = str(caught.value)
    assert all(part in text for part in (*told, "wrong.yaml")) and "Error(" not in text, text


@pytest.mark.slow
def test_a_second_start_trains_only_what_is_missing(tmp_path: Path, spawn: Spawn) -> None:
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(60):
            writer.add_document(rng.integers(0, 97, 100))
    (tmp_path / "config.yaml").write_text(CONFIG)
    line = [WARM_PYTHON, str(EXAMPLE / "run.py"), "config.yaml", "runs"]

    def run() -> tuple[dict[str, dict[str, object]], dict[Path, int]]:
        program = spawn(line, tmp_path)
        assert program.end() == 0, program.output()
        records = map(json.loads, (path.read_text() for path in tmp_path.rglob("result.json")))
        return {record["schedule"]: record for record in records}, times(tmp_path)

    records, first = run()
    assert set(records) == {"scratch lr 0.004", "grown"}
    grown = records["grown"]
    assert grown["steps"] == 12 and len(grown["growth_steps"]) == 1  # type: ignore[arg-type]
    # What the grown run spent lies between what either shape alone would have.
    assert records["scratch lr 0.004"]["flops"] < grown["flops"]  # type: ignore[operator]
    leaf = next(path.parent for path in tmp_path.rglob("result.json") if "l2" in str(path))
    shutil.rmtree(leaf)
    again, second = run()
    assert again == records  # the decay alone was trained again, with the same loss
    changed = {path for path in first if first[path] != second[path]}
    assert {path.parents[1] for path in changed} == {leaf}


SAVED, SEEDS, TRIALS = 0.12, 4, 100
"""Share of compute that the grown runs save; seeds of an experiment; experiments."""


def experiment(analysis: ModuleType, rng: random.Random) -> list[object]:
    """Results with a known saving: seeds shift all losses alike by .05, and each run by .004."""
    results = []
    for seed in range(SEEDS):
        shift = rng.gauss(0, 0.05)

        def run(
            name: str, flops: float, worth: float, *shapes: str, seed: int = seed, shift: float = shift
        ) -> None:
            loss = 2.3 + 0.9 * worth**-0.35 + shift + rng.gauss(0, 0.004)
            stages = [{"shape": shape, "until": 0.0} for shape in shapes]
            results.append(analysis.Result(name, seed, loss, flops * 1e12, 10**6, 10, (), tuple(stages)))

        for flops in (0.5, 1.0, 2.0, 4.0):
            run("best", flops, flops, "a")
            run("worse", flops, 0.8 * flops, "b")
        run("grown", 2.01, 2.01 / (1 - SAVED), "a", "b")
    return results


def test_the_interval_of_a_saving_covers_it(analysis: ModuleType) -> None:
    rng = random.Random(1)
    hits, means = 0, []
    for _ in range(TRIALS):
        study = analysis.Study(experiment(analysis, rng))
        saved = study.saved(study.grown["grown"], 2.01e12)
        against_b = study.saved(study.grown["grown"], 2.01e12, "b")
        assert against_b.mean > saved.mean  # b needs 1 / 0.8 of the FLOPs
        means.append(saved.mean)
        hits += abs(saved.mean - SAVED) <= saved.half
    assert statistics.mean(means) == pytest.approx(SAVED, abs=0.003)
    assert hits / TRIALS > 0.9  # 0.95, with a standard error of 0.02


def test_a_saving_beyond_the_reference_is_not_told(analysis: ModuleType) -> None:
    results = experiment(analysis, random.Random(2))
    stages = ({"shape": "a", "until": 0.0}, {"shape": "b", "until": 0.0})
    results += [analysis.Result("far", seed, -9.0, 2e12, 10**6, 10, (5,), stages) for seed in range(SEEDS)]
    study = analysis.Study(results)
    assert study.saved(study.grown["far"], 2e12) is None


def test_a_growth_without_a_run_to_compare_it_with_has_a_row(analysis: ModuleType) -> None:
    from report import growth_table

    results = experiment(analysis, random.Random(3))
    stages = ({"shape": "a", "until": 0.0}, {"shape": "b", "until": 0.0})
    results.append(analysis.Result("alone", 1, 2.5, 9e12, 10**6, 10, (5,), stages))
    rows = [line for line in growth_table(analysis.Study(results)) if line.startswith(("| alone", "| grown"))]
    assert rows[0].startswith("| grown |  | 2 |") and "worse" not in rows[0]
    assert rows[1] == "| alone | 50% | 9 | 2.5000 (1) |  |  |  |  |  |  |  |"
    assert growth_table(analysis.Study(results))[-1].endswith(
        "Empty: no run from scratch of these FLOPs and seeds."
    )

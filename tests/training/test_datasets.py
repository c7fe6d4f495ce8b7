"""The data of a run, end to end: blends, phases of a growth run, sets by name, the cursor, wrong tokenizers.

Runs the command's own `run` in ranks of their own, on corpora of a few thousand tokens.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.training.metrics import read_metrics
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.law

SMALL = (
    "--vocab-size 61 --num-layers 2 --hidden-size 16 --num-attention-heads 4 --kv-channels 6 "
    "--ffn-hidden-size 27 --nexus-m 19 --nexus-a 23 --init-method-std 0.2 --fp32 --seq-length 12 "
    "--global-batch-size 8 --lr 1e-2 --lr-warmup-iters 3 --lr-decay-iters 20 --eval-interval 0 "
    "--eval-iters 1 --log-interval 100 --split 8,2"
)
BLEND = "--data-path 0.7 {a} 0.3 {b}"


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(3)
    prefixes = {name: tmp_path / name for name in "ab"}
    for prefix, documents in zip(prefixes.values(), (60, 25), strict=True):
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            for length in rng.integers(5, 90, documents):
                writer.add_document(rng.integers(0, 61, length))
    return prefixes


def run_all(ranks: int, folder: Path, runs: list[str]) -> None:
    (folder / "runs.json").write_text(json.dumps([[*SMALL.split(), *words.split()] for words in runs]))
    run_ranks(ranks, TESTS / "training" / "resume_worker.py", str(folder / "runs.json"))


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def test_a_run_reads_the_same_samples_at_any_ranks_micro_batch_and_resume(
    corpora: dict[str, Path], tmp_path: Path
) -> None:
    """A blend, packed, at dp 1 and 2, pp 2, micro-batches of 1, 2, 4 and 8, and resumed from dp 1 elsewhere.

    Larger dp: `tests/data/test_loader.py`. float32 in another order of sums: about 1e-6 a step, which Adam
    lifts where gradients vanish.
    """
    common = BLEND.format(**corpora) + " --reset-attention-mask --reset-position-ids"
    folders = {name: tmp_path / name for name in ("one", "small", "other", "pair", "moved", "piped")}
    run_all(
        1,
        tmp_path,
        [
            f"{common} --micro-batch-size 8 --train-iters 4 --save-interval 2 --save {folders['one']}",
            f"{common} --micro-batch-size 1 --train-iters 4 --save {folders['small']}",
            f"--data-path {corpora['a']} --micro-batch-size 8 --train-iters 4 --save {folders['other']}",
        ],
    )
    start = folders["one"] / "iter_0000002"
    run_all(
        2,
        tmp_path,
        [
            f"{common} --micro-batch-size 2 --train-iters 4 --save {folders['pair']}",
            f"{common} --micro-batch-size 4 --train-iters 4 --load {start} --save {folders['moved']}",
            f"{common} --micro-batch-size 4 --pp 2 --train-iters 4 --save {folders['piped']}",
        ],
    )
    expected = losses(folders["one"])
    assert list(expected) == list(range(1, 5))
    for name in ("small", "pair", "piped"):
        assert losses(folders[name]) == pytest.approx(expected, abs=2e-4), name
    moved = losses(folders["moved"])
    assert moved == pytest.approx({step: expected[step] for step in range(3, 5)}, abs=2e-4)
    # Another blend is another stream: the law above is not one of all losses being alike.
    other = losses(folders["other"])
    assert max(abs(other[step] - expected[step]) for step in expected) > 1e-2


def test_phases_read_ranges_of_their_own_and_sets_have_names(
    corpora: dict[str, Path], tmp_path: Path
) -> None:
    save = tmp_path / "phases"
    once = tmp_path / "once"
    common = f"--data-path {corpora['a']} --micro-batch-size 4"
    run_all(
        1,
        tmp_path,
        [
            f"{common} --save {save} --train-iters 4 --data-range 0:600",
            f"{common} --load {save} --train-iters 6 --data-range 600:1.2K",
            f"--load {save} --train-iters 8",
            f"--load {save} --train-iters 9 --valid-data-path web={corpora['a']} code={corpora['b']} "
            f"--test-data-path {corpora['b']}",
            f"{common} --save {once} --load {save / 'iter_0000004'} --train-iters 8 --data-range 600:1200",
        ],
    )
    first, second, third, last = (read_manifest(save / f"iter_{step:07d}").data for step in (4, 6, 8, 9))
    assert first.first_sample == 0
    assert second.first_sample == third.first_sample == last.first_sample == 32
    assert first.fingerprint != second.fingerprint == third.fingerprint == last.fingerprint
    assert second.description.endswith("600:1,200")
    evaluated = [(r["name"], r["step"]) for r in read_metrics(save / "metrics.jsonl") if "name" in r]
    assert evaluated == [
        *(("validation", step) for step in (4, 6, 8)),
        ("validation web", 9),
        ("validation code", 9),
        ("test", 9),
    ]
    # Two steps, stop, two steps of a phase are its first four: as if it had never been stopped.
    assert losses(once) == {step: losses(save)[step] for step in range(5, 9)}

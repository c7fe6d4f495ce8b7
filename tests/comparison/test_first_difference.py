"""Laws of `nexus compare`: equal topologies agree to 1e-12, and a planted fault is named where it is.

Real ranks record two steps in float64, three families at every kind of parallelism; faults are planted in the
real layers of the second side alone (`recording_worker`).
"""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.comparison.difference_report import report
from megatron_nexus.comparison.first_difference import Comparison, compare
from megatron_nexus.comparison.recording import Key, Phase, Recording
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks
from tests.training.test_parity import FAMILIES, FLAGS

pytestmark = pytest.mark.law

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
FULL = {"recompute_granularity": "full"}
EQUAL: dict[int, dict[str, dict]] = {
    1: {"nexus": {}, "qwen3": FAMILIES["qwen3"], "tokenformer": FAMILIES["tokenformer"]},
    2: {
        "nexus sp": {TP: 2, "sequence_parallel": True, **FULL},
        "nexus dp zero3": {"zero_stage": 3},
        "qwen3 tp": {TP: 2, "recompute_granularity": "selective", **FAMILIES["qwen3"]},
        "qwen3 dp zero2": {"zero_stage": 2, **FAMILIES["qwen3"]},
        "tokenformer dp zero1": {"zero_stage": 1, **FAMILIES["tokenformer"]},
        "tokenformer pp": {PP: 2, **FAMILIES["tokenformer"]},
    },
    4: {"nexus tp pp": {TP: 2, PP: 2, "micro_batch_size": 2}},
}
# Fault: the topology, and the first difference.
FAULTS = {
    "no sum": ({TP: 2}, Key(1, Phase.FORWARD, "layers.1.feed_forward")),
    "no gradient sum": ({TP: 2}, Key(1, Phase.BACKWARD, "layers.1.attention.norm")),
    "wrong scale": ({PP: 2}, Key(1, Phase.FORWARD, "layers.1.attention.heads")),
    "swapped heads": ({TP: 2}, Key(1, Phase.FORWARD, "layers.1.attention.q")),
    "same draw": ({TP: 2}, Key(1, Phase.WEIGHTS, "layers.1.attention.q.w_m")),
    "dropout": ({TP: 2}, Key(1, Phase.FORWARD, "layers.1.attention")),
    "no gradient": ({}, Key(1, Phase.BACKWARD, "layers.1.feed_forward")),
    "stale samples": ({}, Key(2, Phase.DATA, "tokens")),
    "summed gradients": ({}, Key(1, Phase.NORM, "gradient norm")),
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recordings of this file."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(20):
            writer.add_document(rng.integers(0, FLAGS["vocab_size"], 100))
    flags = {**FLAGS, "data_path": (str(folder / "corpus"),), "split": "8,2", "eval_iters": 1}
    for world, equal in EQUAL.items():
        cases = [{"name": name, "steps": 2, "flags": {**flags, **more}} for name, more in equal.items()]
        if world == 2:
            cases += [
                {"name": fault, "fault": fault, "steps": key.step, "flags": {**flags, **more}}
                for fault, (more, key) in FAULTS.items()
            ]
        (folder / "cases.json").write_text(json.dumps(cases))
        worker = TESTS / "comparison" / "recording_worker.py"
        run_ranks(world, worker, str(folder / "cases.json"), str(folder))
    return folder


def found(recordings: Path, a: str, b: str) -> tuple[Comparison, str]:
    ours, theirs = Recording(recordings / a), Recording(recordings / b)
    comparison = compare(ours, theirs)
    return comparison, "\n".join(report(ours, theirs, comparison))


def test_equal_topologies_agree(recordings: Path) -> None:
    for name in [*EQUAL[2], *EQUAL[4]]:
        comparison, said = found(recordings, name.split()[0], name)
        assert comparison.differences == (), said
        assert comparison.compared > 450, said


@pytest.mark.parametrize("name", ["nexus sp", "nexus dp zero3", "nexus tp pp"])
def test_all_of_the_first_step_agrees_to_rounding_of_float64(recordings: Path, name: str) -> None:
    strict = compare(Recording(recordings / "nexus"), Recording(recordings / name), rtol=1e-12)
    # Master weights: Adam divides by gradients that may be as small as rounding.
    first = [one.key for one in strict.differences if one.key.step == 1]
    assert [key for key in first if not key.name.endswith(".fp32")] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(recordings: Path, fault: str) -> None:
    comparison, said = found(recordings, "nexus", fault)
    assert comparison.differences[0].key == FAULTS[fault][1], said
    assert comparison.before > 50 or fault == "same draw", said


def test_what_is_known_of_a_fault(recordings: Path) -> None:
    said = {fault: found(recordings, "nexus", fault)[1] for fault in FAULTS}
    assert "replicas differ in B: ranks 0 and 1" in said["no sum"]
    assert "the copies of the 2 tp ranks of B add up to A" in said["no sum"]
    assert "the copies of the 2 tp ranks of B add up to A" in said["no gradient sum"]
    assert "attention head 2 to 3" in said["swapped heads"]
    assert "in B all of it is on tp rank 1" in said["swapped heads"]
    assert "replicas differ in B: ranks 0 and 1" in said["dropout"]
    assert "head 2 of B is head 3 of A; head 3 of B is head 2 of A" in said["swapped heads"]
    assert "(layers.1.feed_forward): A alone has it" in said["no gradient"]
    assert "B is 2 x A" in said["summed gradients"]

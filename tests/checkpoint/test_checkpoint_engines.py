"""Checkpoints of real DeepSpeed engines in real processes: going on is the same as never stopping.

Every rank of a start runs all cases of `engines_worker.py`; the tests read what it left.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_nexus.checkpoint.chunks import full_box
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.run_dir import find_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from tests.checkpoint import engine_kinds as toy
from tests.support.waiting import TIMEOUT_S
from tests.support.warm_server import WarmProcess

pytestmark = pytest.mark.law


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the toy left behind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    words = [str(Path(__file__).with_name("engines_worker.py")), str(folder)]
    worker = WarmProcess(words, Path.cwd(), {**os.environ, "OMP_NUM_THREADS": "1"}, folder / "log")
    worker.wait(2 * TIMEOUT_S)
    return folder


def outcomes(folder: Path, plan: str, world_size: int) -> list[dict[str, Any]]:
    """What each rank has recorded of each case."""
    last = "failures" if plan == "two" else "continued"
    log = (folder / "log").read_text()[-6000:]
    assert all((folder / plan / f"{last}_{rank}.json").exists() for rank in range(world_size)), log
    return [
        {
            file.stem.removesuffix(f"_{rank}"): json.loads(file.read_text())
            for file in (folder / plan).glob(f"*_{rank}.json")
        }
        for rank in range(world_size)
    ]


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return outcomes(folder, "two", 2)


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    return outcomes(folder, "four", 4)


def bytes_of(checkpoint: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))]


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = CheckpointReader(one), CheckpointReader(other)
    first.verify()
    second.verify()
    assert first.manifest.specs.keys() == second.manifest.specs.keys()
    for spec in first.manifest.specs.values():
        for state in STATES:
            box = full_box(spec.shape)
            values = first.read_box(spec.name, state, box)
            assert (values == second.read_box(spec.name, state, box)).all(), (spec.name, state)
            assert values.any(), "a comparison of zeros shows nothing"


def assert_resumed_exactly(results: list[dict[str, Any]], folder: Path, kind: toy.Kind) -> None:
    for rank in (outcome[kind.name] for outcome in results):
        for through, resumed in (rank["first"], rank["losses"], rank["random"], rank["counters"]):
            assert through == resumed
        assert rank["off_master"] == []
        assert rank["missing_names"] == []
        assert rank["progress"] == ["read", "written"]
    saved = folder / kind.name
    assert bytes_of(toy.at_step(saved / "through", 6)) == bytes_of(toy.at_step(saved / "resumed", 6))


def assert_crossed(results: list[dict[str, Any]], folder: Path, here: toy.Kind, there: toy.Kind) -> None:
    name = f"{here.name}-to-{there.name}"
    assert all(outcome[name] == [] for outcome in results)
    source = toy.at_step(folder / here.name / "through", 3)
    assert_same_tensors(source, toy.at_step(folder / name / "there", 3))
    back = toy.at_step(folder / name / "back", 3)
    assert bytes_of(source) == bytes_of(back)


@pytest.mark.parametrize("kind", toy.TWO_RANKS, ids=lambda kind: kind.name)
def test_two_ranks_resume_exactly(two: list[dict[str, Any]], folder: Path, kind: toy.Kind) -> None:
    assert_resumed_exactly(two, folder / "two", kind)


@pytest.mark.parametrize("kind", toy.FOUR_RANKS, ids=lambda kind: kind.name)
def test_four_ranks_resume_exactly(four: list[dict[str, Any]], folder: Path, kind: toy.Kind) -> None:
    assert_resumed_exactly(four, folder / "four", kind)


@pytest.mark.parametrize("here, there", toy.TWO_RANK_CROSSINGS, ids=lambda kind: kind.name)
def test_topology_of_two_changes(
    two: list[dict[str, Any]], folder: Path, here: toy.Kind, there: toy.Kind
) -> None:
    assert_crossed(two, folder / "two", here, there)


@pytest.mark.parametrize("here, there", toy.FOUR_RANK_CROSSINGS, ids=lambda kind: kind.name)
def test_topology_of_four_changes(
    four: list[dict[str, Any]], folder: Path, here: toy.Kind, there: toy.Kind
) -> None:
    assert_crossed(four, folder / "four", here, there)


def test_a_save_has_as_many_files_as_nodes_and_two(four: list[dict[str, Any]], folder: Path) -> None:
    files = {"index.json", "manifest.json", "ranks_00000-00001.safetensors"}
    for plan, kinds, more in (
        ("two", toy.TWO_RANKS, set()),
        ("four", toy.FOUR_RANKS, {"ranks_00002-00003.safetensors"}),
    ):
        for kind in kinds:
            saved = toy.at_step(folder / plan / kind.name / "through", 3)
            assert {path.name for path in saved.iterdir()} == files | more


def test_all_three_optimizers_ran(two: list[dict[str, Any]]) -> None:
    ran = {two[0][kind.name]["optimizer"] for kind in toy.TWO_RANKS}
    assert ran == {"DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"}


def test_one_rank_s_error_is_every_rank_s(two: list[dict[str, Any]], folder: Path) -> None:
    for outcome in (rank["failures"] for rank in two):
        assert "rank 1: [Errno 28] No space left on device" in outcome["full_disk"]
        assert "earlier checkpoints are untouched" in outcome["full_disk"]
        assert "rank 0: the writer failed: MemoryError: no more" in outcome["crash"]
        assert outcome["after_full_disk"] == ["iter_0000001", "latest"]
        assert "rank 0: " in outcome["file_in_the_way"]
        assert outcome["after_replacing"] == ["iter_0000001", "latest"]
        assert outcome["replaced_off_master"] == []
    CheckpointReader(find_checkpoint(folder / "two" / "failing")).verify()


def test_another_model_is_refused(two: list[dict[str, Any]]) -> None:
    for outcome in (rank["failures"] for rank in two):
        assert (
            "up.weight: inner 13 x hidden 7 in the checkpoint, inner 15 x hidden 7 in the model"
            in (outcome["other_shape"])
        )
        assert "up.gain: hidden 7 in the checkpoint, not in the model" in outcome["fewer_parameters"]
        assert all("manifest.json" in outcome[case] for case in ("other_shape", "fewer_parameters"))


def test_killed_save_leaves_the_previous_checkpoint(two: list[dict[str, Any]], folder: Path) -> None:
    root = folder / "two" / "killed"
    codes = json.loads((folder / "codes.json").read_text())
    assert codes["two"][1] == -signal.SIGKILL and codes["two"][0] != 0
    assert codes["four"] == [0] * 4
    assert (root / ".tmp_iter_0000002").is_dir(), "the save was killed too late to show anything"
    assert find_checkpoint(root) == toy.at_step(root, 1)
    CheckpointReader(toy.at_step(root, 1)).verify()


def test_four_ranks_take_up_a_killed_run_of_two(four: list[dict[str, Any]], folder: Path) -> None:
    root = folder / "continued"
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000001", "iter_0000002", "latest"]
    assert_same_tensors(toy.at_step(root, 1), toy.at_step(root, 2))

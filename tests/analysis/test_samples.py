"""Base and grown weights: found by the lineage, drawn alike at every topology, read in bounded memory."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.analysis import samples
from megatron_nexus.analysis.samples import Sample, make_groups, read_samples
from megatron_nexus.checkpoint.chunks import are_disjoint, full_box, index_within
from megatron_nexus.checkpoint.data_file import Array
from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.checkpoint.saved_run import saved_config
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.growth.generations import boxes_by_growth
from megatron_nexus.spec.shard import Box
from tests.support import checkpoints

GROWTHS = [
    {"nexus_m": 21, "nexus_a": 30},
    checkpoints.AXES["all"] | {"nexus_m": 25, "nexus_a": 33, "attention_order": 2},
    {"num_layers": 5, "kv_channels": 7, "num_attention_heads": 4},
]


def boxes_of(folder: Path) -> tuple[Manifest, dict[str, list[tuple[Box, int]]]]:
    manifest = CheckpointReader(folder).manifest
    return manifest, boxes_by_growth(saved_config(folder, manifest).model, manifest.lineage)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint and three growths, each of the one before."""
    root, config = tmp_path_factory.mktemp("chain"), checkpoints.configure()
    folders = [checkpoints.write_checkpoint(root / "0", config)]
    for number, sizes in enumerate(GROWTHS, start=1):
        depth = {"depth_init": "random"} if "num_layers" in sizes else {}
        made, config = checkpoints.grow(folders[-1], root / str(number), config, sizes, init="noise", **depth)
        folders.append(made)
    return folders


def test_the_lineage_says_which_growth_added_each_weight(chain: list[Path]) -> None:
    manifest, boxes = boxes_of(chain[-1])
    held = checkpoints.tensors(chain[-1])
    for name, spec in manifest.specs.items():
        parts = [box for box, _ in boxes[name]]
        assert are_disjoint(parts) and sum(box.numel for box in parts) == spec.numel, name

    def values(numbers: set[int]) -> Array:
        """All weights that these growths added, sorted."""
        found = [
            held[name][index_within(box, full_box(held[name].shape))].ravel()
            for name, parts in boxes.items()
            for box, number in parts
            if number in numbers
        ]
        return np.sort(np.concatenate(found))

    # Growth keeps old weights bit for bit, so each checkpoint of the chain is the older part of the last.
    for number, folder in enumerate(chain):
        whole = np.concatenate([tensor.ravel() for tensor in checkpoints.tensors(folder).values()])
        assert np.array_equal(values(set(range(number + 1))), np.sort(whole)), number


def test_of_a_fresh_growth_they_are_the_regions_that_adam_corrects(chain: list[Path]) -> None:
    for before, after in pairwise(chain):
        manifest, boxes = boxes_of(after)
        number = len(CheckpointReader(before).manifest.lineage) + 1
        regions = {(region.tensor, region.box) for region in manifest.optimizer.grown_regions}
        newest = {(name, box) for name, parts in boxes.items() for box, added in parts if added == number}
        assert newest <= regions and newest


def draw(folder: Path, count: int, growth: int = 1, whole: bool = False) -> dict[str, Sample]:
    manifest, boxes = boxes_of(folder)
    groups = make_groups(manifest.specs, boxes, growth, whole, None)
    groups = [group for group in groups if group.base and group.grown]
    return read_samples(CheckpointReader(folder), groups, count, seed=3)


def test_groups_hold_what_their_names_say(chain: list[Path]) -> None:
    found = draw(chain[1], 10**9)
    weights = checkpoints.tensors(chain[1])
    w_m, w_a = (weights[f"layers.1.attention.k.w_{stage}"] for stage in "ma")
    matrix = found["layers.1.attention.k.w_m"]
    assert np.array_equal(matrix.base, w_m[:15].ravel()) and np.array_equal(matrix.grown, w_m[15:].ravel())
    matrix = found["layers.1.attention.k.w_a"]
    assert np.array_equal(matrix.base, w_a[:19, :15].ravel())
    outside = np.ones(w_a.shape, bool)
    outside[:19, :15] = False
    assert np.array_equal(np.sort(matrix.grown), np.sort(w_a[outside]))
    whole = draw(chain[1], 10**9, whole=True)["layers.1.attention.k.w_a"]
    assert np.array_equal(np.sort(whole.grown), np.sort(w_a.ravel()))
    levels = ["all", "layer 0", "layer 1", "attention.q.w_m", "attention.v.w_d", "layers.0.attention.v.w_d"]
    assert set(levels) <= found.keys() and not any("feed_forward" in name for name in found)
    assert len(found["all"].base) == sum(len(found[f"layer {i}"].base) for i in range(2))


def test_an_older_growth_is_seen_in_the_checkpoints_of_later_ones(chain: list[Path]) -> None:
    first = draw(chain[1], 10**9)["all"]
    later = draw(chain[-1], 10**9)["all"]
    assert np.array_equal(np.sort(first.base), np.sort(later.base))
    assert np.array_equal(np.sort(first.grown), np.sort(later.grown))


def test_samples_are_seeded_subsets_without_repetition(chain: list[Path]) -> None:
    few, all_of = draw(chain[1], 100), draw(chain[1], 10**9)
    for name, sample in few.items():
        for side in ("base", "grown"):
            drawn, population = getattr(sample, side), getattr(all_of[name], side)
            assert len(drawn) == min(100, len(population)), name
            # Weights are distinct numbers here: drawn from a normal distribution.
            assert len(set(drawn)) == len(drawn) and set(drawn) <= set(population)
    again = draw(chain[1], 100)
    assert all(np.array_equal(few[name].grown, again[name].grown) for name in few)


def test_matrices_are_read_in_pieces_and_each_once(
    chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(chain[1], 50)
    monkeypatch.setattr(samples, "PIECE_ELEMENTS", 60)
    read: list[tuple[str, Box]] = []
    real = CheckpointReader.read_box

    def read_box(reader: CheckpointReader, tensor: str, state: str, box: Box) -> Array:
        read.append((tensor, box))
        return real(reader, tensor, state, box)

    monkeypatch.setattr(CheckpointReader, "read_box", read_box)
    found = draw(chain[1], 50)
    assert all(np.array_equal(found[name].base, sample.base) for name, sample in expected.items())
    assert max(box.numel for _, box in read) <= 60 and len(set(read)) == len(read)

"""What each recipe of growth makes of weights, moments and step counts, tensor by tensor."""

from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.checkpoint.chunks import full_box, index_within
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.growth.generations import boxes_by_growth
from tests.support import checkpoints

WRITERS = ("attention.output.weight", "feed_forward.down")
"""What writes to the residual stream."""


@pytest.mark.parametrize(
    ("depth_init", "old", "new", "placement", "sources"),
    [
        ("stack", 2, 5, "interleaved", [None, None, 0, 1, 0]),
        ("stack", 1, 3, "interleaved", [None, 0, 0]),
        ("copy", 2, 4, "interleaved", [None, 0, None, 1]),
        ("copy", 2, 4, "end", [None, None, 1, 1]),
        ("copy", 1, 3, "interleaved", [None, 0, 0]),
        ("random", 1, 3, "interleaved", [None, None, None]),
    ],
)
def test_new_layers_are_copies_of_old_ones(
    depth_init: str, old: int, new: int, placement: str, sources: list[int | None], tmp_path: Path
) -> None:
    config = checkpoints.configure(num_layers=old)
    source = checkpoints.write_checkpoint(tmp_path / "old", config)
    settings = {"depth_init": depth_init, "depth_placement": placement, "moments": "copied"}
    made, after = checkpoints.grow(source, tmp_path / "new", config, {"num_layers": new}, **settings)
    for state in STATES:
        before, now = checkpoints.tensors(source, state), checkpoints.tensors(made, state)
        for layer, origin in enumerate(sources):
            if origin is None:
                continue
            for name in (n for n in before if n.startswith(f"layers.{origin}.")):
                found = now[name.replace(f"layers.{origin}.", f"layers.{layer}.", 1)]
                zero = depth_init == "copy" and name.endswith(WRITERS)
                assert np.array_equal(found, np.zeros_like(found) if zero else before[name]), (name, layer)
    manifest = read_manifest(made)
    # What is copied goes on with the step count of its source; the rest begins anew.
    begun = {region.tensor for region in manifest.optimizer.grown_regions}
    names = [n for n in manifest.specs if n.startswith("layers.")]
    expected = {
        "stack": set(),
        "copy": {n for n in names if n.endswith(WRITERS) and sources[int(n.split(".")[1])] is not None},
        "random": {n for n in names if not n.startswith("layers.0.")},
    }
    assert begun == expected[depth_init]
    assert manifest.lineage[-1]["settings"]["depth_init"] == depth_init
    # The lineage still knows which layers came last.
    last = {name for name, parts in boxes_by_growth(after.model, manifest.lineage).items() if parts[0][1]}
    copied = {n for n in names if sources[int(n.split(".")[1])] is not None}
    assert last == (expected["random"] if depth_init == "random" else copied)


@pytest.mark.parametrize("moments", ["kept", "copied", "reset"])
def test_moments_and_step_counts_follow_their_setting(moments: str, tmp_path: Path) -> None:
    """Of a growth of a growth: copies of weights that have a count of their own."""
    config = checkpoints.configure(num_layers=1)
    source = checkpoints.write_checkpoint(tmp_path / "0", config)
    once, middle = checkpoints.grow(source, tmp_path / "1", config, {"num_layers": 2, "nexus_m": 18})
    sizes = {"num_layers": 4, "nexus_a": 25}
    settings = {"depth_init": "stack", "moments": moments}
    twice, _ = checkpoints.grow(once, tmp_path / "2", middle, sizes, **settings)
    manifest = read_manifest(twice)
    if moments == "reset":
        assert (manifest.optimizer.step_count, manifest.optimizer.grown_regions) == (0, ())
        assert manifest.progress.step == checkpoints.STEP
    else:
        assert manifest.optimizer.step_count == checkpoints.STEP
    counts = {name: np.full(spec.shape, checkpoints.STEP) for name, spec in manifest.specs.items()}
    for region in manifest.optimizer.grown_regions:
        counts[region.tensor][index_within(region.box, full_box(counts[region.tensor].shape))] = 0
    old_m, new_a = np.s_[:, :15], np.s_[19:]
    for state in ("exp_avg", "exp_avg_sq"):
        before, now = checkpoints.tensors(once, state), checkpoints.tensors(twice, state)
        for layer, source_layer in enumerate((0, 1, 0, 1)):
            name, was = (f"layers.{i}.attention.q.w_a" for i in (layer, source_layer))
            has = moments == "copied" or (moments == "kept" and layer < 2)
            assert np.array_equal(now[name][:19], before[was] if has else np.zeros_like(before[was]))
            assert not now[name][new_a].any()
            if moments != "reset":
                # Old M of the first layer, its copies where moments are copied too: all of their steps.
                assert counts[name][:19][old_m].all() == (has and source_layer == 0)
                assert not counts[name][:19, 15:].any() and not counts[name][new_a].any()

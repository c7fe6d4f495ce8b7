"""What each recipe of growth makes of weights, moments and step counts, tensor by tensor."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nexus.checkpoint.chunks import full_box, index_within
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError
from megatron_nexus.growth.generations import boxes_by_growth
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import GrowthRequest, read_request
from megatron_nexus.growth.settings import GrowthConfig
from tests.support import checkpoints, reference
from tests.support.cases import first_by_default

TOKENFORMER = {
    "projection": "pattention",
    "pattention_slots": 26,
    "feed_forward": "pattention",
    "nexus_m": 0,
    "nexus_a": 0,
}
WRITERS = ("attention.output.weight", "feed_forward.down")
"""What writes to the residual stream."""


@pytest.mark.parametrize(
    ("depth_init", "old", "new", "placement", "sources"),
    [
        ("stack", 2, 5, "interleaved", [None, None, 0, 1, 0]),
        pytest.param("stack", 1, 3, "interleaved", [None, 0, 0], marks=pytest.mark.law),
        ("copy", 2, 4, "interleaved", [None, 0, None, 1]),
        pytest.param("copy", 2, 4, "end", [None, None, 1, 1], marks=pytest.mark.law),
        pytest.param("copy", 1, 3, "interleaved", [None, 0, 0], marks=pytest.mark.law),
        pytest.param("random", 1, 3, "interleaved", [None, None, None], marks=pytest.mark.law),
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
    # What is copied goes on with the step count of its source; the rest starts from zero.
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


@pytest.mark.parametrize("moments", first_by_default(1, ["copied", "kept", "reset"]))
def test_moments_and_step_counts_follow_their_setting(moments: str, tmp_path: Path) -> None:
    """Of a growth of a growth: copies of weights that have a count of their own."""
    config = checkpoints.configure(num_layers=1)
    source = checkpoints.write_checkpoint(tmp_path / "0", config)
    first = {"num_layers": 2, "nexus_m": 18}
    once, middle = checkpoints.grow(
        source, tmp_path / "1", config, first, init="out_rand", depth_init="random", moments="kept"
    )
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


def gradients(folder: Path, config: RunConfig) -> dict[str, torch.Tensor]:
    w = {name: t.requires_grad_() for name, t in checkpoints.weights(folder).items()}
    tokens = checkpoints.sample(config.model)
    loss = reference.loss(w, tokens, tokens.roll(-1, 1), dataclasses.asdict(config.model))
    return dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


@pytest.mark.parametrize("axes", first_by_default(1, ["M-A", "FFN", "heads"]))
def test_copied_moments_are_scaled_as_the_gradients_of_copies_are(axes: str, tmp_path: Path) -> None:
    """At the growth the gradient of every old or copied element is a known multiple of its source's."""
    config = checkpoints.configure()
    source = checkpoints.write_checkpoint(tmp_path / "old", config)
    sizes, settings = checkpoints.AXES[axes], {"init": "split", "moments": "copied"}
    made, after = checkpoints.grow(source, tmp_path / "new", config, sizes, **settings)
    assert read_manifest(made).optimizer.grown_regions == ()
    before, now = gradients(source, config), gradients(made, after)
    moments = {s: (checkpoints.tensors(source, s), checkpoints.tensors(made, s)) for s in STATES[1:]}
    plan = plan_growth(config, GrowthRequest(sizes, GrowthConfig(**settings)))
    factors = set()
    for name, tensor in plan.tensors.items():
        for box in tensor.boxes:
            there = index_within(box.box, full_box(tensor.spec.shape))
            here = index_within(box.old, full_box(tensor.old.shape))
            # Shares are rounded to float32: 6e-8 of each term of a sum.
            expected = box.gradient * before[name][here]
            assert (now[name][there] - expected).abs().max() <= 1e-6 * before[name].abs().max(), name
            factors.add((box.fill, box.gradient))
            for power, (old, new) in enumerate(moments.values(), start=1):
                scaled = old[name][here] * np.float32(box.gradient**power)
                assert np.array_equal(new[name][there], scaled)
    assert {("kept", 1.0), ("kept", 1.5), ("copied", -0.5), ("scaled", 1.0)} <= factors


@pytest.mark.parametrize(
    ("init", "share", "moments", "parts"),
    [
        ("split", 1.5, "copied", True),
        pytest.param("split", 1.5, "kept", True, marks=pytest.mark.law),
        pytest.param("split", 0.5, "copied", False, marks=pytest.mark.law),
        pytest.param("pairs", 1.5, "kept", True, marks=pytest.mark.law),
    ],
)
def test_adam_parts_units_whose_outgoing_weights_have_opposite_signs_and_no_others(
    init: str, share: float, moments: str, parts: bool, tmp_path: Path
) -> None:
    """Relative distance of the incoming weights of W_M and gate after 20 steps of AdamW, in float64."""
    config = checkpoints.configure(lr=1e-2)
    source = checkpoints.write_checkpoint(tmp_path / "old", config)
    sizes = (
        {"nexus_m": 30, "ffn_hidden_size": 34} if init == "split" else {"nexus_m": 21, "ffn_hidden_size": 23}
    )
    settings = {"init": init, "split_share": share, "moments": moments}
    made, after = checkpoints.grow(source, tmp_path / "new", config, sizes, **settings)
    w, first, second = (
        {name: torch.from_numpy(t).double() for name, t in checkpoints.tensors(made, s).items()}
        for s in STATES
    )
    steps = {name: torch.full_like(t, checkpoints.STEP) for name, t in w.items()}
    for region in read_manifest(made).optimizer.grown_regions:
        steps[region.tensor][index_within(region.box, full_box(tuple(w[region.tensor].shape)))] = 0.0
    tokens = checkpoints.sample(config.model)
    state = {name: (first[name], second[name], steps[name]) for name in w}
    ended = reference.train(w, [(tokens, tokens.roll(-1, 1))] * 20, dataclasses.asdict(after), state=state)
    for name, old in (("layers.0.attention.v.w_m", 15), ("layers.0.feed_forward.gate", 17)):
        weights = ended["weights"][name].detach()
        half = (len(weights) - old) // 2
        one, two = (weights[:old], weights[old:]) if init == "split" else weights[old:].split(half)
        distance = float((one - two).norm() / one.norm())
        # Identical sums may differ in rounding by their place in a matrix.
        assert distance > 0.02 if parts else distance < 1e-9, (name, distance)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    first_by_default(
        2,
        [
            ({"init": "in_rand"}, {"nexus_m": 60, "nexus_a": 76, "ffn_hidden_size": 68}),  # x 4
            ({"init": "pairs"}, {"nexus_m": 45, "nexus_a": 57, "num_attention_heads": 6}),  # x 3
            ({"init": "in_rand"}, {"nexus_m": 18, "nexus_a": 23, "ffn_hidden_size": 21}),  # x 1.2
            ({"init": "split", "split_share": 0.5}, {"nexus_m": 30, "num_attention_heads": 4}),
            ({"init": "split", "split_share": 0.75}, {"nexus_m": 22, "nexus_a": 28, "ffn_hidden_size": 25}),
            ({"init": "split", "split_share": 2.0}, {"hidden_size": 24, "nexus_m": 16}),
            ({"init": "out_rand", "depth_init": "copy"}, {"num_layers": 8}),
            ({"init": "split", "depth_init": "copy", "split_share": 0.75}, {"num_layers": 5, "nexus_m": 29}),
        ],
    ),
)
def test_any_factor_and_share_keeps_the_function_and_trains_every_new_element(
    settings: dict, sizes: dict[str, int], tmp_path: Path
) -> None:
    config = checkpoints.configure()
    source = checkpoints.write_checkpoint(tmp_path / "old", config)
    made, after = checkpoints.grow(source, tmp_path / "new", config, sizes, **settings)
    tokens, model = checkpoints.sample(config.model), dataclasses.asdict(after.model)
    before = reference.logits(checkpoints.weights(source), tokens, dataclasses.asdict(config.model))
    assert (reference.logits(checkpoints.weights(made), tokens, model) - before).abs().max() <= 1e-12
    w = {name: t.requires_grad_() for name, t in checkpoints.weights(made).items()}
    reached = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in w.items()}
    tokens = torch.arange(config.model.vocab_size).repeat(2).view(-1, 2).T.contiguous()
    for _ in range(3):
        loss = reference.loss(w, tokens, tokens.roll(-1, 1), model)
        with torch.no_grad():
            gradients = torch.autograd.grad(loss, list(w.values()))
            for (name, t), gradient in zip(w.items(), gradients, strict=True):
                reached[name] |= gradient != 0
                t -= 0.1 * gradient
    for name, tensor in plan_growth(config, GrowthRequest(sizes, GrowthConfig(**settings))).tensors.items():
        for box in (box.box for box in tensor.boxes if box.is_new):
            assert reached[name][index_within(box, full_box(tensor.spec.shape))].all(), (name, box)


@pytest.mark.law
def test_of_four_copies_two_never_part_which_is_why_split_at_most_doubles(tmp_path: Path) -> None:
    """Two splits in a row: shares 9/4, -3/4, -3/4, 1/4, of which Adam parts those of unlike sign alone."""
    config = checkpoints.configure(lr=1e-2)
    source = checkpoints.write_checkpoint(tmp_path / "0", config)
    once, middle = checkpoints.grow(source, tmp_path / "1", config, {"nexus_m": 30}, init="split")
    made, after = checkpoints.grow(once, tmp_path / "2", middle, {"nexus_m": 60}, init="split")
    w, first, second = (
        {name: torch.from_numpy(t).double() for name, t in checkpoints.tensors(made, s).items()}
        for s in STATES
    )
    state = {name: (first[name], second[name], torch.full_like(w[name], checkpoints.STEP)) for name in w}
    tokens = checkpoints.sample(config.model)
    ended = reference.train(w, [(tokens, tokens.roll(-1, 1))] * 20, dataclasses.asdict(after), state=state)
    one, other, third, fourth = ended["weights"]["layers.0.attention.v.w_m"].detach().split(15)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / a.norm())

    assert max(distance(one, fourth), distance(other, third)) < 0.01
    assert min(distance(one, other), distance(one, third), distance(fourth, third)) > 0.02


@pytest.mark.parametrize(
    ("options", "sizes", "settings", "message"),
    [
        ({}, {"nexus_m": 31}, {"init": "split"}, ["--nexus-m 15", "up to 30"]),
        ({}, {"hidden_size": 20}, {"init": "split"}, ["--hidden-size 20", "give 24"]),
        ({}, {"nexus_m": 20}, {"init": "split", "split_share": 0.4}, ["--split-share 0.4", "[0.5, 2]"]),
        ({}, {"nexus_m": 20}, {"init": "in_rand", "split_share": 1.2}, ["--split-share 1.2", "--init split"]),
        ({}, {"nexus_m": 20}, {"init": "split", "noise_share": 0.2}, ["--noise-share 0.2", "--init noise"]),
        ({}, {"nexus_m": 20}, {"init": "pairs"}, ["--nexus-m 20 adds 5", "give 21"]),
        ({"nexus_inner_norm": True}, {"nexus_m": 20}, {"init": "split"}, ["inner norm", "--init out_rand"]),
        (
            {"nexus_inner_norm": True},
            {"hidden_size": 24},
            {"init": "split"},
            ["inner norm", "--init out_rand"],
        ),
        (TOKENFORMER, {"pattention_slots": 30}, {"init": "split"}, ["30 is not twice 26", "give 52"]),
        (TOKENFORMER, {"pattention_slots": 30}, {"init": "pairs"}, ["random keys", "--init out_rand"]),
    ],
)
def test_what_a_division_cannot_keep_is_refused(
    options: dict, sizes: dict[str, int], settings: dict, message: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_growth(checkpoints.configure(**options), GrowthRequest(sizes, GrowthConfig(**settings)))
    assert all(part in str(caught.value) for part in message), caught.value


def test_a_size_that_is_no_number_is_told_without_a_command_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"'abc': give --num-layers INT$"):
        read_request("num_layers=abc")


def test_a_request_without_a_size_names_the_flag_that_it_was_given_to() -> None:
    with pytest.raises(
        ConfigError, match="--target-sizes 'init=split' names no size: write such as nexus_m="
    ):
        read_request("init=split", "--target-sizes")

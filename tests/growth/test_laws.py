"""The laws of growth, for every axis and all of them together, by the float64 reference model.

Growth keeps the function; a gradient reaches every new weight within three steps; growth and resharding
commute; the same seed gives the same weights whatever topology wrote, reads or shares the work.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_nexus.checkpoint.chunks import full_box, index_within
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import GrowthRequest
from megatron_nexus.growth.settings import GrowthConfig
from tests.support import checkpoints, reference
from tests.support.cases import first_by_default

# Sums over longer rows in float64, of logits of size one.
TOLERANCE = 1e-12
OPTIONS = {
    "plain": {},
    "options": {"nexus_inner_norm": True, "nexus_output_projection": True},
    "released": {
        "nexus_inner_norm": True,
        "nexus_inner_norm_scale": "width",
        "nexus_output_projection": True,
        "feed_forward": "nexus",
        "ffn_nexus_m": 14,
    },
    "qwen3": {
        "projection": "linear",
        "nexus_m": 0,
        "nexus_a": 0,
        "num_query_groups": 1,
        "qk_layernorm": True,
    },
    "order": {"attention_order": 3, "num_query_groups": 1, "qk_layernorm": True},
    "order-cross": {"attention_order": 2, "num_query_groups": 1, "attention_inner": "cross"},
    "order-gated": {"attention_order": 2, "num_query_groups": 1, "attention_gate": True},
    "tokenformer": {
        "projection": "pattention",
        "pattention_slots": 26,
        "feed_forward": "pattention",
        "normalization": "NonParametricLayerNorm",
        "nexus_m": 0,
        "nexus_a": 0,
    },
}
# Attention's heads and keys, the norms, and everything at once decide whether a division is exact.
DIVIDED = {
    "D": ["plain", "qwen3", "tokenformer"],
    "heads": ["plain", "qwen3", "order-cross"],
    "heads-head-dim": ["plain", "qwen3", "order"],
    "all": ["plain", "qwen3", "order-gated", "tokenformer"],
}
RECIPES: dict[str, dict[str, str]] = {
    **{init: {"init": init} for init in ("out_rand", "in_rand", "zero")},
    "copy": {"init": "out_rand", "depth_init": "copy"},
    "copy-split": {"init": "split", "depth_init": "copy"},
    "split": {"init": "split"},
    "pairs": {"init": "pairs"},
}
CASES = [
    # By default each recipe on all axes at once, and each axis by one recipe.
    pytest.param(
        recipe,
        axes,
        option,
        marks=() if option == "plain" and (axes == "all" or recipe == "split") else pytest.mark.law,
    )
    for recipe in RECIPES
    for axes in checkpoints.AXES
    if not recipe.startswith("copy") or "num_layers" in checkpoints.AXES[axes]
    # The options change what M and A, the attention's width and the hidden size lead to.
    for option in (
        DIVIDED.get(axes, ["plain"])
        if recipe in ("split", "pairs", "copy-split")
        else OPTIONS
        if axes in ("M-A", "D", "heads-head-dim", "all")
        else ["plain", "tokenformer", "released"]
    )
    if not (option == "qwen3" and axes == "M-A")
    if not (option == "tokenformer" and axes in ("M", "A", "heads", "head-dim", "vocabulary"))  # in "all"
    # Norms see new units that are active at once: refused.
    if not (
        recipe in ("in_rand", "pairs")
        and option in ("options", "released", "tokenformer")
        and axes in ("M", "A", "M-A", "FFN", "all")
    )
]


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[RunConfig, Path, Tensor]]:
    """The configuration of an option, a checkpoint, which growth only reads, and its logits."""

    @functools.cache
    def make(option: str) -> tuple[RunConfig, Path, Tensor]:
        config = checkpoints.configure(**OPTIONS[option])
        source = checkpoints.write_checkpoint(tmp_path_factory.mktemp("old"), config)
        weights, tokens = checkpoints.weights(source), checkpoints.sample(config.model)
        return config, source, reference.logits(weights, tokens, dataclasses.asdict(config.model))

    return make


@pytest.mark.parametrize(("recipe", "axes", "option"), CASES)
def test_growth_keeps_the_function_and_every_new_weight_trains(
    recipe: str,
    axes: str,
    option: str,
    source_of: Callable[[str], tuple[RunConfig, Path, Tensor]],
    tmp_path: Path,
) -> None:
    """But for `zero`, where no gradient reaches a new block; of new tokens alone the weights are drawn."""
    config, source, before = source_of(option)
    settings = RECIPES[recipe]
    sizes = checkpoints.sizes_of_recipe(config, axes, settings["init"])
    if "num_layers" in sizes:
        settings = {"depth_init": "random", **settings}
    made, after = checkpoints.grow(source, tmp_path / "new", config, sizes, **settings)
    tokens = checkpoints.sample(config.model)
    w = {name: t.requires_grad_() for name, t in checkpoints.weights(made).items()}
    with torch.no_grad():
        logits = reference.logits(w, tokens, dataclasses.asdict(after.model))
    assert logits.shape[-1] == after.model.vocab_size
    assert before.abs().max() > 0.5, "logits of nothing would show nothing"
    assert (logits[..., : config.model.vocab_size] - before).abs().max() <= TOLERANCE

    reached = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in w.items()}
    # Every token occurs, so every row of the embedding can be reached.
    tokens = torch.arange(after.model.vocab_size).repeat(2).view(-1, 2).T.contiguous()
    # What has no zero on its paths, or one alone, needs no third step.
    for _ in range(2 if recipe in ("copy", "copy-split", "split", "pairs") else 3):
        loss = reference.loss(w, tokens, tokens.roll(-1, 1), dataclasses.asdict(after.model))
        gradients = torch.autograd.grad(loss, list(w.values()))
        with torch.no_grad():
            for (name, t), gradient in zip(w.items(), gradients, strict=True):
                reached[name] |= gradient != 0
                t -= 0.1 * gradient
    if recipe == "zero" and "vocab_size" in checkpoints.AXES[axes]:
        return
    plan = plan_growth(config, GrowthRequest(sizes, GrowthConfig(**settings)))
    new = 0
    for name, tensor in plan.tensors.items():
        for block in tensor.boxes:
            if block.is_new:
                there = reached[name][index_within(block.box, full_box(tensor.spec.shape))]
                new += there.numel()
                assert not there.any() if recipe == "zero" else there.all(), (name, block)
    assert new > 0


def test_old_weights_and_moments_are_kept_and_new_moments_are_zero(tmp_path: Path) -> None:
    config = checkpoints.configure()
    source = checkpoints.write_checkpoint(tmp_path / "old", config)
    settings = {"depth_init": "random", "depth_placement": "end"}
    made, _ = checkpoints.grow(source, tmp_path / "new", config, checkpoints.AXES["all"], **settings)
    plan = plan_growth(config, GrowthRequest(checkpoints.AXES["all"], GrowthConfig(**settings)))
    for state in STATES:
        old, new = checkpoints.tensors(source, state), checkpoints.tensors(made, state)
        for name, tensor in plan.tensors.items():
            rest = new[name].copy()
            for block in tensor.boxes:
                if block.old is not None:
                    there = index_within(block.box, full_box(tensor.spec.shape))
                    here = index_within(block.old, full_box(tensor.old.shape))
                    assert np.array_equal(new[name][there], old[tensor.old.name][here])
                    rest[there] = 0.0
            assert state == "fp32" or not rest.any()


@pytest.mark.parametrize(
    ("axes", "option", "settings"),
    [
        ("M-A", "plain", {"init": "pairs"}),
        pytest.param("all", "released", {}, marks=pytest.mark.law),
        pytest.param("all", "plain", {"init": "split", "moments": "copied"}, marks=pytest.mark.law),
        pytest.param("all", "tokenformer", {"depth_init": "copy"}, marks=pytest.mark.law),
    ],
)
def test_growth_and_resharding_commute_bit_for_bit(
    axes: str, option: str, settings: dict[str, str], tmp_path: Path
) -> None:
    config = checkpoints.configure(**OPTIONS[option])
    sizes = checkpoints.sizes_of_recipe(config, axes, settings.get("init", ""))
    sources = {tp: checkpoints.write_checkpoint(tmp_path / f"source{tp}", config, tp) for tp in (1, 2)}
    moved, same = checkpoints.grow(sources[2], tmp_path / "moved", config, {}, tp=1, pp=2)
    assert same.model == config.model
    first, _ = checkpoints.grow(moved, tmp_path / "first", config, sizes, tp=1, pp=2, workers=2, **settings)
    alone, after = checkpoints.grow(sources[1], tmp_path / "alone", config, sizes, **settings)
    second, _ = checkpoints.grow(alone, tmp_path / "second", after, {}, tp=1, pp=2)
    for state in STATES:
        expected = checkpoints.tensors(alone, state)
        for folder in (first, second):
            found = checkpoints.tensors(folder, state)
            assert all(np.array_equal(found[name], values) for name, values in expected.items())
    # Down to the bytes of the files.
    for one in sorted(first.glob("rank_*")):
        assert one.read_bytes() == (second / one.name).read_bytes()


def test_a_growth_of_a_growth_keeps_its_function_and_its_lineage(tmp_path: Path) -> None:
    config = checkpoints.configure()
    folder, tokens = checkpoints.write_checkpoint(tmp_path / "0", config), checkpoints.sample(config.model)
    expected = reference.logits(checkpoints.weights(folder), tokens, dataclasses.asdict(config.model))
    for generation, (axes, placement) in enumerate((("all", "interleaved"), ("larger", "end")), start=1):
        sizes = {**checkpoints.AXES["all"]}
        if axes == "larger":
            sizes = {name: size + 2 for name, size in sizes.items()}
        settings = {"depth_init": "random", "depth_placement": placement}
        folder, config = checkpoints.grow(folder, tmp_path / str(generation), config, sizes, **settings)
        logits = reference.logits(checkpoints.weights(folder), tokens, dataclasses.asdict(config.model))
        assert (logits[..., :37] - expected).abs().max() <= TOLERANCE
    manifest = read_manifest(folder)
    assert [entry["generation"] for entry in manifest.lineage] == [1, 2]
    assert manifest.lineage[1]["axes"]["nexus_m"] == [21, 23]
    assert manifest.lineage[1]["parent"] == str((tmp_path / "1" / "iter_0000040").resolve())
    assert config.model.base_hidden_size == 12
    assert config.model.base_kv_channels == 4


def test_a_pattention_keeps_its_scale_at_initialization_over_growths(tmp_path: Path) -> None:
    """But by `random`, as in the released code of Tokenformer, where it follows the slots and all changes."""
    config = checkpoints.configure(**OPTIONS["tokenformer"])
    folder, tokens = checkpoints.write_checkpoint(tmp_path / "0", config), checkpoints.sample(config.model)
    expected = reference.logits(checkpoints.weights(folder), tokens, dataclasses.asdict(config.model))
    slots = {"pattention_slots": 30, "ffn_hidden_size": 20}
    once, middle = checkpoints.grow(folder, tmp_path / "1", config, slots)
    twice, after = checkpoints.grow(once, tmp_path / "2", middle, {name: n + 5 for name, n in slots.items()})
    for made, model in ((once, middle.model), (twice, after.model)):
        assert (model.base_pattention_slots, model.base_ffn_hidden_size) == (26, 17)
        logits = reference.logits(checkpoints.weights(made), tokens, dataclasses.asdict(model))
        assert (logits - expected).abs().max() <= TOLERANCE
    released, other = checkpoints.grow(folder, tmp_path / "3", config, slots, init="random")
    assert (other.model.base_pattention_slots, other.model.base_ffn_hidden_size) == (0, 0)
    logits = reference.logits(checkpoints.weights(released), tokens, dataclasses.asdict(other.model))
    assert (logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("axes", first_by_default(1, ["all", "M-A", "D"]))
@pytest.mark.parametrize(
    "option",
    [pytest.param(o, marks=() if o in ("plain", "released") else pytest.mark.law) for o in OPTIONS],
)
def test_the_default_is_the_best_rule_that_keeps_the_function_of_the_model(
    option: str, axes: str, source_of: Callable[[str], tuple[RunConfig, Path, Tensor]], tmp_path: Path
) -> None:
    """Resolved once, in the lineage too; what is not a copy has zero moments and a step count of its own."""
    config, source, before = source_of(option)
    sizes = checkpoints.sizes_of_recipe(config, axes, "")
    if not sizes:
        pytest.skip(f"{option} has no {axes}")
    depth = {"num_layers"} & set(sizes)
    settings = {"depth_init": "copy"} if depth else {}
    made, after = checkpoints.grow(source, tmp_path / "new", config, sizes, **settings)
    tokens = checkpoints.sample(config.model)
    logits = reference.logits(checkpoints.weights(made), tokens, dataclasses.asdict(after.model))
    assert (logits[..., : config.model.vocab_size] - before).abs().max() <= TOLERANCE

    manifest = read_manifest(made)
    recorded = manifest.lineage[-1]["settings"]
    sees_new = option in ("options", "released", "tokenformer") and axes != "D"
    assert recorded["init"] == ("out_rand" if sees_new else "in_rand")
    assert recorded["moments"] == "copied"
    if sees_new:
        with pytest.raises(ConfigError, match=r"--init in_rand .* use --init out_rand"):
            plan_growth(config, GrowthRequest(sizes, GrowthConfig(init="in_rand", **settings)))
    regions = {(region.tensor, region.box) for region in manifest.optimizer.grown_regions}
    moments = {state: checkpoints.tensors(made, state) for state in STATES[1:]}
    plan = plan_growth(config, GrowthRequest(sizes, GrowthConfig(**settings)))
    assert plan.settings.init == recorded["init"]
    for name, tensor in plan.tensors.items():
        for block in tensor.boxes:
            assert (block.old is None) == ((name, block.box) in regions)
            if block.old is None:
                there = index_within(block.box, full_box(tensor.spec.shape))
                assert not any(values[name][there].any() for values in moments.values())
    # New layers are stacked, unless it is said otherwise.
    stacked = plan_growth(config, GrowthRequest({"num_layers": 3}, GrowthConfig()))
    assert (stacked.changes, stacked.settings.placement) == (["--depth-init stack"], "end")


@pytest.mark.parametrize("name", ["pattention_slots", "ffn_hidden_size"])
def test_active_new_slots_are_refused(name: str) -> None:
    """Random keys enter the norm over all slots at once."""
    config = checkpoints.configure(**OPTIONS["tokenformer"])
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"in_rand gives new slots .{flag}.*use --init out_rand"):
        plan_growth(config, GrowthRequest({name: 40}, GrowthConfig(init="in_rand")))


def test_grown_regions_cover_what_is_new_once(tmp_path: Path) -> None:
    config = checkpoints.configure()
    source = checkpoints.write_checkpoint(tmp_path / "0", config)
    settings = {"depth_init": "random"}
    once, middle = checkpoints.grow(source, tmp_path / "1", config, checkpoints.AXES["all"], **settings)
    larger = {name: size + 2 for name, size in checkpoints.AXES["all"].items()}
    twice, _ = checkpoints.grow(once, tmp_path / "2", middle, larger, **settings)
    manifest = read_manifest(twice)
    old = read_manifest(source).specs
    born = {name: np.zeros(spec.shape, int) for name, spec in manifest.specs.items()}
    for region in manifest.optimizer.grown_regions:
        assert region.adam_step == checkpoints.STEP
        born[region.tensor][index_within(region.box, full_box(born[region.tensor].shape))] += 1
    assert all(values.max() <= 1 for values in born.values())
    kept = sum(int((values == 0).sum()) for values in born.values())
    assert kept == sum(spec.numel for spec in old.values())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A checkpoint of matrices large enough for statistics of what is drawn, and its configuration."""
    config = checkpoints.configure(nexus_m=400, nexus_a=500)
    source = checkpoints.write_checkpoint(tmp_path_factory.mktemp("wide"), config, chunk_elements=1 << 24)
    return config, source


def test_new_weights_are_drawn_as_a_new_model_of_the_new_widths_draws_them(
    wide: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    config, source = wide
    sizes = {"nexus_m": 600, "nexus_a": 800}
    made, _ = checkpoints.grow(source, tmp_path / "1", config, sizes, init="out_rand")
    new, q = checkpoints.tensors(made), "layers.0.attention.q"
    gelu = 0.6521  # sqrt(E[gelu(z)^2]), from tables of the normal distribution
    # A deviation of n values is known to 1 / sqrt(2 n).
    corner = new[f"{q}.w_a"][500:, 400:]
    assert corner.std() == pytest.approx(1 / (gelu * 600**0.5), rel=0.02)
    readers = new[f"{q}.w_d"][:, 500:]
    assert readers.std() == pytest.approx(0.3 * 12**0.5 / (3 * gelu * 800**0.5), rel=0.06)


def test_noise_is_a_share_of_the_old_deviation(wide: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, source = wide
    sizes = {"nexus_m": 600, "nexus_a": 800}
    made, _ = checkpoints.grow(source, tmp_path / "1", config, sizes, init="noise", noise_share=0.2)
    old, new = checkpoints.tensors(source), checkpoints.tensors(made)
    name = "layers.0.attention.q.w_a"
    for block in (new[name][500:, :400], new[name][:500, 400:], new[name][500:, 400:]):
        # A deviation of n values is known to 1 / sqrt(2 n): 1 % is several of them.
        assert block.std() == pytest.approx(0.2 * old[name].std(), rel=0.02)


@pytest.mark.parametrize("seed", first_by_default(1, [1234, 5]))
def test_new_weights_depend_on_the_seed_and_the_generation_only(seed: int, tmp_path: Path) -> None:
    config = checkpoints.configure()
    sizes = checkpoints.AXES["M-A"]
    values = {}
    for weight_seed in (7, 8):
        source = checkpoints.write_checkpoint(tmp_path / f"{weight_seed}", config, seed=weight_seed)
        made, _ = checkpoints.grow(source, tmp_path / f"{weight_seed}-grown", config, sizes, growth_seed=seed)
        values[weight_seed] = checkpoints.tensors(made)["layers.1.attention.v.w_a"][:, 15:]
    assert np.array_equal(values[7], values[8])
    other, _ = checkpoints.grow(source, tmp_path / "other", config, sizes, growth_seed=seed + 1)
    assert not np.array_equal(checkpoints.tensors(other)["layers.1.attention.v.w_a"][:, 15:], values[7])

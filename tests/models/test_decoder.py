"""Laws of the decoder on one rank: costs are what torch counts, the future stays hidden, stages compose."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.models.decoder import (
    DecoderStage,
    Loss,
    decoder_specs,
    layer_flops_per_token,
    stage_layers,
    training_flops_per_token,
)
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.spec.param import Constant
from megatron_nexus.spec.shard import Shard
from tests.support import reference

ALONE = LayerContext(TensorParallel(None), Shard(0, 1), seed=3, dtype=torch.float64)
MODEL = ModelConfig(
    vocab_size=50,
    num_layers=3,
    hidden_size=24,
    num_attention_heads=2,
    kv_channels=10,
    ffn_hidden_size=40,
    nexus_m=30,
    nexus_a=36,
    init_method_std=0.2,
)
ALL = range(MODEL.num_layers + 2)
MODELS = {
    "nexus": {},
    "nexus output": {"nexus_output_projection": True},
    "released": {
        "nexus_inner_norm_scale": "width",
        "nexus_output_projection": True,
        "feed_forward": "nexus",
        "ffn_nexus_m": 31,
    },
    "linear": {"projection": "linear"},
    "linear and nexus": {"projection": "linear_nexus"},
    "qwen3": {"projection": "linear", "num_query_groups": 1, "qk_layernorm": True},
    "biases, scaled positions, window": {
        "projection": "linear",
        "num_query_groups": 1,
        "add_qkv_bias": True,
        "use_rope_scaling": True,
        "original_max_position_embeddings": 12,
        "sliding_window": 5,
        "no_rope_freq": 2,
    },
    "olmo 2": {
        "projection": "linear",
        "num_query_groups": 1,
        "qk_layernorm": True,
        "qk_layernorm_all_heads": True,
        "post_norm": True,
    },
    "order 2": {"attention_order": 2},
    "order 3": {"projection": "linear", "num_query_groups": 1, "qk_layernorm": True, "attention_order": 3},
    "order 3 cross": {"num_query_groups": 1, "attention_order": 3, "attention_inner": "cross"},
    "gated order 2": {"num_query_groups": 1, "attention_order": 2, "attention_gate": True},
    "tokenformer": {
        "projection": "pattention",
        "pattention_slots": 33,
        "feed_forward": "pattention",
        "normalization": "NonParametricLayerNorm",
    },
}
each_model = pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
# What differs most in cost by default, the others as laws.
COSTS = ("nexus", "released", "qwen3", "order 3 cross", "tokenformer")
each_cost = pytest.mark.parametrize(
    "fields",
    [pytest.param(fields, marks=() if name in COSTS else pytest.mark.law) for name, fields in MODELS.items()],
    ids=MODELS,
)
# One family by default, all of them as laws.
each_model_as_law = pytest.mark.parametrize(
    "fields",
    [pytest.param(fields, marks=pytest.mark.law if n else ()) for n, fields in enumerate(MODELS.values())],
    ids=MODELS,
)


def open_gates(stage: DecoderStage) -> DecoderStage:
    """Give the gates, which are zeros at first, values."""
    for spec, parameter in logical_parameters(stage).values():
        if spec.init == Constant(0.0):
            parameter.data = torch.linspace(0.3, 1.2, len(parameter), dtype=parameter.dtype)
    return stage


def _tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, MODEL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


@each_model
def test_specs_describe_exactly_the_parameters_that_are_built(fields: dict[str, object]) -> None:
    model = dataclasses.replace(MODEL, **fields)
    stage = DecoderStage(model, ALL, ALONE)
    built = logical_parameters(stage)
    assert {name: spec for name, (spec, _) in built.items()} == decoder_specs(model)
    assert all(tuple(parameter.shape) == spec.shape for spec, parameter in built.values())
    assert sum(p.numel() for p in stage.parameters()) == parameter_count(decoder_specs(model).values())


@each_cost
def test_training_flops_are_those_that_torch_counts(fields: dict[str, object]) -> None:
    model = dataclasses.replace(MODEL, **fields)
    tokens = _tokens()
    assert _counted_flops(model, ALONE) == training_flops_per_token(model, tokens.shape[1]) * tokens.numel()


def _counted_flops(model: ModelConfig, context: LayerContext, *positions_BT: torch.Tensor) -> int:
    """FLOPs of a forward and backward pass as torch counts them; `positions_BT` of packed documents."""
    stage, tokens = DecoderStage(model, ALL, context), _tokens()
    # The counter does not know the fused attention of the CPU; that of plain products it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = stage((tokens, *positions_BT) if positions_BT else tokens)
        Loss(model, context.tp, context.shard)(logits, tokens).backward()
    return int(counter.get_total_flops())


@each_model_as_law
def test_a_mask_of_documents_saves_no_flops_and_selective_recompute_costs_none(
    fields: dict[str, object],
) -> None:
    model = dataclasses.replace(MODEL, **fields)
    plain = _counted_flops(model, ALONE)
    positions = torch.arange(16).remainder(5).expand(2, 16)
    packed = dataclasses.replace(ALONE, reset_position_ids=True, reset_attention_mask=True)
    assert _counted_flops(model, packed, positions) == plain
    for grouped in (False, True):
        context = dataclasses.replace(ALONE, recompute="selective", group_projections=grouped)
        assert _counted_flops(model, context) == plain


@each_model_as_law
def test_full_recompute_repeats_the_blocks_which_the_model_s_flops_leave_out(
    fields: dict[str, object],
) -> None:
    model = dataclasses.replace(MODEL, **fields)
    tokens = _tokens()
    blocks = sum(layer_flops_per_token(model, tokens.shape[1])[1:-1]) * tokens.numel()
    # torch stops before each block's last product, unless a norm after it needs its outputs in backward.
    last = (
        0
        if model.post_norm
        else model.num_layers * 2 * model.ffn_hidden_size * model.hidden_size * tokens.numel()
    )
    again = _counted_flops(model, dataclasses.replace(ALONE, recompute="full")) - _counted_flops(model, ALONE)
    assert again == blocks - last


@each_model
def test_a_token_sees_nothing_of_the_future(fields: dict[str, object]) -> None:
    stage, tokens = DecoderStage(dataclasses.replace(MODEL, **fields), ALL, ALONE), _tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % MODEL.vocab_size
    before, after = stage(tokens), stage(changed)
    assert torch.equal(before[:9], after[:9])
    assert not torch.equal(before[9:], after[9:])


def test_stages_in_a_row_are_the_whole_decoder() -> None:
    tokens = _tokens()
    whole = DecoderStage(MODEL, ALL, ALONE)(tokens)
    x = tokens
    for layers in stage_layers(MODEL, 16, 3):
        x = DecoderStage(MODEL, layers, ALONE)(x)
    assert torch.equal(x, whole)


def test_stages_are_cut_by_cost_and_cover_all_layers() -> None:
    heavy_head = dataclasses.replace(MODEL, vocab_size=5000)
    layers = stage_layers(heavy_head, 16, 2)
    assert [*layers[0], *layers[1]] == list(ALL)
    flops = layer_flops_per_token(heavy_head, 16)
    assert flops[-1] > sum(flops[:-1])
    assert list(layers[1]) == [MODEL.num_layers + 1], (
        "a head that costs more than all blocks has a stage of its own"
    )


def test_the_loss_is_cross_entropy_and_starts_at_the_logarithm_of_the_vocabulary() -> None:
    stage = DecoderStage(dataclasses.replace(MODEL, init_method_std=1e-3), ALL, ALONE)
    tokens, labels = _tokens(), _tokens().roll(1, dims=1)
    loss = Loss(MODEL, ALONE.tp, ALONE.shard)(stage(tokens), labels)
    logits = stage(tokens).permute(1, 2, 0)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-12)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(50.0)).item(), abs=1e-3)


@pytest.mark.parametrize("grown", [False, True])
@each_model
def test_logits_equal_the_reference(fields: dict[str, object], grown: bool) -> None:
    born = {"base_hidden_size": 17, "base_kv_channels": 6} if grown else {}
    if grown and fields.get("projection") == "pattention":
        born |= {"base_pattention_slots": 20, "base_ffn_hidden_size": 31}
    if grown and fields.get("feed_forward") == "nexus":
        born |= {"base_nexus_m": 28, "base_nexus_a": 29, "base_ffn_nexus_m": 25, "base_ffn_hidden_size": 31}
    inner_norm = fields.get("projection", "nexus") == "nexus"
    model = dataclasses.replace(MODEL, nexus_inner_norm=inner_norm, **fields, **born)
    stage, tokens = open_gates(DecoderStage(model, ALL, ALONE)), _tokens()
    weights = {name: parameter.detach() for name, (_, parameter) in logical_parameters(stage).items()}
    expected = reference.logits(weights, tokens, dataclasses.asdict(model))
    assert torch.allclose(stage(tokens).transpose(0, 1), expected, rtol=0.0, atol=1e-12)

"""The presets are the paper's sizes, whose true parameter counts do not follow from their names."""

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.presets import PRESETS
from megatron_nexus.config.rules import check
from megatron_nexus.growth.request import GROWING, GrowthRequest, grown_config
from megatron_nexus.growth.settings import GrowthConfig
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.cost import parameter_count

# Tables 6 and 7: layers, D, FFN, then M and A, or slots; and the true count in millions, untied head.
PAPER = {
    "nexusformer-170m": (12, 768, 1706, 780, 800, 169.6),
    "nexusformer-240m": (12, 768, 2048, 780, 960, 187.9),
    "nexusformer-300m": (12, 768, 2048, 1088, 1228, 225.0),
    "nexusformer-380m": (12, 768, 2048, 1340, 1530, 266.0),
    "nexusformer-440m": (12, 768, 2048, 1540, 1730, 299.2),
    "nexusformer-480m": (24, 800, 2304, 896, 968, 369.1),
    "nexusformer-640m": (24, 1024, 2560, 1152, 1280, 565.0),
    "qwen3-170m": (12, 848, 3392, 0, 0, 181.3),
    "qwen3-240m": (12, 1088, 4032, 0, 0, 267.7),
    "qwen3-300m": (12, 1240, 4880, 0, 0, 354.4),
    "qwen3-380m": (12, 1300, 6912, 0, 0, 466.6),
    "qwen3-440m": (12, 1360, 6912, 0, 0, 488.2),
    "qwen3-480m": (24, 1344, 3760, 0, 0, 573.8),
    "qwen3-640m": (24, 1536, 4608, 0, 0, 777.9),
    "tokenformer-170m": (12, 768, 4096, 1024, 0, 200.1),
    "tokenformer-240m": (12, 768, 3072, 2088, 0, 259.7),
    "tokenformer-300m": (12, 768, 3072, 2952, 0, 323.4),
    "tokenformer-380m": (12, 800, 3072, 3960, 0, 408.2),
    "tokenformer-440m": (12, 1024, 3072, 4824, 0, 615.3),
    "tokenformer-480m": (24, 800, 5888, 1472, 0, 503.4),
    "tokenformer-640m": (24, 1024, 6144, 1536, 0, 669.5),
    "transformer++-170m": (12, 512, 2048, 0, 0, 83.1),
    "transformer++-240m": (12, 1024, 2560, 0, 0, 210.3),
    "transformer++-480m": (24, 1408, 3648, 0, 0, 650.3),
    "transformer++-640m": (24, 1632, 4243, 0, 0, 858.8),
}
SMALL = {
    "nexusformer-tiny": 2.6,
    "nexusformer-20m": 23.6,
    "nexusformer-released-tiny": 2.7,
    "nexusformer-released-240m": 194.5,
    "qwen3-tiny": 1.8,
    "tokenformer-tiny": 2.4,
    "transformer++-tiny": 1.8,
}


def model_of(preset: str) -> ModelConfig:
    return build(given_flags(["--preset", preset])).model


def count_by_hand(model: ModelConfig) -> int:
    """The equations of the layers, added up: projections, output, SwiGLU, norms, embedding and head.

    Tokenformer's maps are keys and values, its norms have no parameters.
    """
    d, m, a, width = model.hidden_size, model.nexus_m, model.nexus_a, model.attention_width
    keys = width * (model.num_query_groups or model.num_attention_heads) // model.num_attention_heads
    if model.projection == "pattention":
        slots = model.pattention_slots
        block = sum(slots * (d + outputs) for outputs in (width, keys, keys, width)) + (
            2 * d * model.ffn_hidden_size
        )
        return model.num_layers * block + 2 * model.vocab_size * d

    def rank(inputs: int, m: int, a: int, outputs: int) -> int:
        return inputs * m + m * a + a * outputs

    block = rank(width, m, a, d) if model.nexus_output_projection else width * d
    f, f_m = model.ffn_hidden_size, model.ffn_nexus_m
    block += 2 * d + (rank(d, f_m, f, d) if model.feed_forward == "nexus" else 3 * d * f)
    for outputs in (width, keys, keys):
        block += d * outputs if model.projection == "linear" else rank(d, m, a, outputs)
    if model.qk_layernorm:
        block += 2 * model.kv_channels
    return model.num_layers * block + 2 * model.vocab_size * d + d


@pytest.mark.parametrize("preset", PAPER)
def test_a_paper_preset_has_the_paper_s_sizes_and_the_true_count(preset: str) -> None:
    model = model_of(preset)
    *sizes, millions = PAPER[preset]
    assert [
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        model.nexus_m or model.pattention_slots,
        model.nexus_a,
    ] == sizes
    assert model.vocab_size == 32_000
    grows_hidden = preset == "tokenformer-380m"
    assert model.attention_width == model.hidden_size or preset.startswith("qwen3") or grows_hidden
    count = parameter_count(decoder_specs(model).values())
    assert round(count / 1e6, 1) == millions
    assert count == count_by_hand(model)


def test_the_presets_are_the_paper_s_and_small_ones() -> None:
    assert PRESETS.keys() - PAPER.keys() == SMALL.keys()
    for preset, millions in SMALL.items():
        count = parameter_count(decoder_specs(model_of(preset)).values())
        assert count == count_by_hand(model_of(preset))
        assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("target", ["300m", "380m", "440m"])
@pytest.mark.parametrize("family", ["nexusformer", "tokenformer"])
def test_the_paper_s_growth_targets_can_be_grown_into(family: str, target: str) -> None:
    saved = build(given_flags(["--preset", f"{family}-240m"]))
    larger = build(given_flags(["--preset", f"{family}-{target}"])).model
    sizes = {name: getattr(larger, name) for name in GROWING}
    after = grown_config(saved, GrowthRequest(sizes, GrowthConfig()))
    assert after.preset == f"{family}-{target}"
    grown_sizes = {name: getattr(after.model, name) for name in GROWING}
    assert grown_sizes == sizes


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("nexusformer")])
def test_widths_grow_through_a_nexus_rank(preset: str) -> None:
    model = model_of(preset)
    assert model.hidden_size < model.nexus_m < model.nexus_a


def test_every_preset_passes_the_rules_where_its_batch_fits() -> None:
    """`check` raises where a rule is broken, and names the flag."""
    for preset in PRESETS:
        for topology in ({}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}):
            config = build({"preset": preset, **topology})
            check(config, config.model_parallel_size)
            if preset in PAPER:
                check(config, 8)

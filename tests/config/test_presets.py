"""The presets are the paper's sizes, whose true parameter counts do not follow from their names."""

import pytest

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.presets import DEFAULT_PRESET, PRESETS
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import ModelConfig
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.cost import parameter_count

# Nexusformer, Tables 6 and 7: layers, D, FFN, M, A; and the true count in millions, untied head.
PAPER = {
    "nexusformer-170m": (12, 768, 1706, 780, 800, 169.6),
    "nexusformer-240m": (12, 768, 2048, 780, 960, 187.9),
    "nexusformer-300m": (12, 768, 2048, 1088, 1228, 225.0),
    "nexusformer-380m": (12, 768, 2048, 1340, 1530, 266.0),
    "nexusformer-440m": (12, 768, 2048, 1540, 1730, 299.2),
    "nexusformer-480m": (24, 800, 2304, 896, 968, 369.1),
    "nexusformer-640m": (24, 1024, 2560, 1152, 1280, 565.0),
}


def model_of(preset: str) -> ModelConfig:
    return build(given_flags(["--preset", preset])).model


def count_by_hand(model: ModelConfig) -> int:
    """The equations of the layers, added up: three Nexus-Ranks, output, SwiGLU, norms, embedding and head."""
    d, m, a, width = model.hidden_size, model.nexus_m, model.nexus_a, model.attention_width
    block = 3 * (d * m + m * a + a * width) + width * d + 3 * d * model.ffn_hidden_size + 2 * d
    return model.num_layers * block + 2 * model.vocab_size * d + d


@pytest.mark.parametrize("preset", PAPER)
def test_a_paper_preset_has_the_paper_s_sizes_and_the_true_count(preset: str) -> None:
    model = model_of(preset)
    *sizes, millions = PAPER[preset]
    assert [
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        model.nexus_m,
        model.nexus_a,
    ] == sizes
    assert model.vocab_size == 32_000
    assert model.attention_width == model.hidden_size
    count = parameter_count(decoder_specs(model).values())
    assert round(count / 1e6, 1) == millions
    assert count == count_by_hand(model)


def test_the_presets_are_the_paper_s_and_two_small_ones() -> None:
    assert PRESETS.keys() - PAPER.keys() == {DEFAULT_PRESET, "nexusformer-20m"}
    count = parameter_count(decoder_specs(model_of("nexusformer-20m")).values())
    assert count == count_by_hand(model_of("nexusformer-20m"))
    assert round(count / 1e6, 1) == 23.6


@pytest.mark.parametrize("preset", PRESETS)
def test_widths_grow_through_a_nexus_rank(preset: str) -> None:
    model = model_of(preset)
    assert model.hidden_size < model.nexus_m < model.nexus_a


@pytest.mark.parametrize(("preset", "topology"), [(p, t) for p in PRESETS for t in ("", "--tp 2", "--pp 2")])
def test_every_preset_passes_the_rules_where_its_batch_fits(preset: str, topology: str) -> None:
    config = build(given_flags(["--preset", preset, *topology.split()]))
    check(config, config.model_parallel_size)
    if preset in PAPER:
        check(config, 8)

"""Law: logits of decoding with a cache are those of the whole text at once; float64, to 1e-12."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_nexus.models.decoder import DecoderStage
from megatron_nexus.models.kv_cache import KeyValueCache
from tests.models.test_decoder import ALL, ALONE, MODEL, MODELS, open_gates
from tests.support.cases import first_by_default

LENGTH = 12
ORDER_3: dict[str, object] = {"attention_order": 3, "num_query_groups": 1}
ORDER_3_CROSS: dict[str, object] = {**ORDER_3, "attention_inner": "cross"}
# Heads that have grown hold channels that do not turn.
KINDS: list[dict[str, object]] = [
    {},
    {"projection": "linear", "num_query_groups": 1, "qk_layernorm": True},
    {"base_kv_channels": 6, "nexus_output_projection": True},
    ORDER_3,
    ORDER_3_CROSS,
    {**ORDER_3, "base_kv_channels": 6, "attention_gate": True},
    MODELS["tokenformer"],
    MODELS["biases, scaled positions, window"],
]


def sample(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, MODEL.vocab_size, (rows, LENGTH), generator=generator)


def assert_equal(made: Tensor, expected: Tensor) -> None:
    assert torch.allclose(made, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("chunks", first_by_default(1, [[7, 1, 1, 3], [1] * LENGTH, [5, 7], [LENGTH]]))
@pytest.mark.parametrize("changes", KINDS)
def test_cached_logits_are_those_of_the_whole_text(chunks: list[int], changes: dict[str, object]) -> None:
    stage, tokens = open_gates(DecoderStage(dataclasses.replace(MODEL, **changes), ALL, ALONE)), sample(2)
    expected_TBV = stage(tokens)
    cache = KeyValueCache(MODEL.num_layers, LENGTH)
    end = 0
    for chunk in chunks:
        logits_BV = stage.decode(tokens[:, end : end + chunk], cache)
        end += chunk
        assert_equal(logits_BV, expected_TBV[end - 1])


@pytest.mark.parametrize("changes", [{}, ORDER_3, ORDER_3_CROSS, {"sliding_window": 4}])
def test_prompts_of_different_lengths_are_each_as_alone(changes: dict[str, object]) -> None:
    stage, tokens = open_gates(DecoderStage(dataclasses.replace(MODEL, **changes), ALL, ALONE)), sample(3)
    padding = [0, 5, 3]
    padded = tokens.clone()
    for row, count in enumerate(padding):
        padded[row, :count] = 0
    cache = KeyValueCache(MODEL.num_layers, LENGTH, padding)
    made = {end: stage.decode(padded[:, start:end], cache) for start, end in [(0, 9), (9, 10), (10, 12)]}
    for row, count in enumerate(padding):
        alone_TBV = stage(tokens[row : row + 1, count:])
        for end, logits_BV in made.items():
            assert_equal(logits_BV[row], alone_TBV[end - count - 1, 0])


def test_a_rewound_cache_goes_on_in_another_way() -> None:
    stage, tokens = DecoderStage(MODEL, ALL, ALONE), sample(2)
    cache = KeyValueCache(MODEL.num_layers, LENGTH)
    first = stage.decode(tokens[:1, :6], cache)
    stage.decode(tokens[1:, 6:], cache)
    cache.rewind(6)
    assert cache.length == 6
    assert_equal(first, stage(tokens[:1, :6])[-1])
    assert_equal(stage.decode(tokens[:1, 6:], cache), stage(tokens[:1])[-1])

"""Laws of higher-order attention: no parameters, order 1 is standard, scores beyond a head's rank."""

import dataclasses
import math

import pytest
import torch
from test_decoder import ALONE, MODEL
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.config.run_config import ModelConfig
from megatron_nexus.models.attention import Attention
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.models.rotary import rotary_tables, rotate

PROJECTIONS = {
    "nexus": {},
    "linear": {"projection": "linear"},
    "grouped": {"projection": "linear", "num_query_groups": 1, "qk_layernorm": True},
}
each_projection = pytest.mark.parametrize("fields", PROJECTIONS.values(), ids=PROJECTIONS)
HEAD = MODEL.kv_channels


def model_of(order: int, fields: dict[str, object]) -> ModelConfig:
    return dataclasses.replace(MODEL, attention_order=order, **fields)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outer_scores(model: ModelConfig, x_TBD: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The scores [B, N, T, T] before the softmax of the last attention that a layer computes."""
    layer, calls = Attention(model, "layers.0.attention", ALONE), []
    attend = layer._attend
    monkeypatch.setattr(layer, "_attend", lambda *given: calls.append(given) or attend(*given))
    with torch.no_grad():
        layer(x_TBD)
    assert len(calls) == 2 * model.attention_order - 1
    _, q, k, _ = calls[-1]
    scores: Tensor = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(model.kv_channels)
    return scores


def ranks(matrices: Tensor) -> list[int]:
    """Singular values below 1e-10 of the largest are rounding: float64, products of a few dozen terms."""
    return torch.linalg.matrix_rank(matrices, rtol=1e-10).flatten().tolist()


@each_projection
@pytest.mark.parametrize("order", [2, 3, 7])
def test_no_order_has_parameters_of_its_own(order: int, fields: dict[str, object]) -> None:
    assert decoder_specs(model_of(order, fields)) == decoder_specs(model_of(1, fields))


@each_projection
def test_order_1_is_standard_attention_bit_for_bit(fields: dict[str, object]) -> None:
    layer, x_TBD = Attention(model_of(1, fields), "layers.0.attention", ALONE), random(12, 3, 24)
    q, k, v = (y.unflatten(-1, (-1, HEAD)) for y in layer.qkv(layer.norm(x_TBD)))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    tables = rotary_tables(12, HEAD, MODEL.rotary_base, x_TBD.device, x_TBD.dtype)
    mixed = F.scaled_dot_product_attention(
        rotate(q, *tables), rotate(k, *tables), v.permute(1, 2, 0, 3), is_causal=True, enable_gqa=True
    )
    assert torch.equal(layer(x_TBD), layer.output(mixed.permute(2, 0, 1, 3).flatten(2)))


@each_projection
@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_of_a_pair_of_tokens_have_a_rank_above_the_head_size_from_order_2_on(
    order: int, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs of 3 x `HEAD` tokens y, first in a text, and x, last in it; what is between them stays."""
    count = 3 * HEAD
    x_KD, y_KD, between_D = random(count, 24, seed=1), random(count, 24, seed=2), random(24, seed=3)
    first = y_KD.expand(count, -1, -1)
    last = x_KD[:, None].expand(-1, count, -1)
    texts_TBD = torch.stack([first, between_D.expand_as(first), last]).flatten(1, 2)
    scores = outer_scores(model_of(order, fields), texts_TBD, monkeypatch)
    pairs_NKK = scores[:, :, 2, 0].unflatten(0, (count, count)).movedim(-1, 0)
    found = ranks(pairs_NKK)
    assert all(rank == HEAD if order == 1 else rank > HEAD for rank in found), found


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_within_one_text_have_at_most_the_rank_of_a_head(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refined or not, queries and keys are `HEAD` numbers each: what an order adds lies between texts."""
    scores = outer_scores(model_of(order, {}), random(3 * HEAD, 2, 24), monkeypatch)
    assert max(ranks(scores)) <= HEAD


@pytest.mark.parametrize("order", [1, 2])
def test_a_score_depends_on_the_tokens_around_its_pair_from_order_2_on(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_TBD = random(4, 1, 24)
    other = x_TBD.clone()
    other[1] = random(1, 24, seed=1)
    one, two = (outer_scores(model_of(order, {}), x, monkeypatch)[0, :, 3, 2] for x in (x_TBD, other))
    assert torch.equal(one, two) is (order == 1)

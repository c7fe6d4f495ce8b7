"""Laws of higher-order attention: no parameters, order 1 is standard, scores beyond a head's rank."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.config.command_line import build
from megatron_nexus.config.config_file import read_config_file
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.evaluation.loaded_model import load_model
from megatron_nexus.models.attention import Attention
from megatron_nexus.models.decoder import DecoderStage, Loss, decoder_specs
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.models.rotary import Tables, rotate, stage_tables
from megatron_nexus.spec.param import Constant
from tests.models.test_decoder import ALL, ALONE, MODEL
from tests.support import reference
from tests.support.cases import first_by_default

GROUPED = {"projection": "linear", "num_query_groups": 1, "qk_layernorm": True}
PROJECTIONS = {
    "nexus": {},
    "linear": {"projection": "linear"},
    "grouped": GROUPED,
    "grouped cross": {**GROUPED, "attention_inner": "cross"},
    "cross": {"attention_inner": "cross"},
}
each_projection = pytest.mark.parametrize("fields", PROJECTIONS.values(), ids=PROJECTIONS)
HEAD = MODEL.kv_channels


def model_of(order: int, fields: dict[str, object]) -> ModelConfig:
    return dataclasses.replace(MODEL, attention_order=order, **fields)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tables_of(x_TBD: Tensor) -> Tables:
    return stage_tables(MODEL, len(x_TBD), x_TBD)


def outer_scores(model: ModelConfig, x_TBD: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The scores [B, N, T, T] before the softmax of the last attention that a layer computes."""
    layer, calls = Attention(model, "layers.0.attention", ALONE), []
    attend = layer._attend
    monkeypatch.setattr(layer, "_attend", lambda *given: calls.append(given) or attend(*given))
    with torch.no_grad():
        layer(x_TBD, tables_of(x_TBD))
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
    tables = tables_of(x_TBD)
    mixed = F.scaled_dot_product_attention(
        rotate(q, tables), rotate(k, tables), v.permute(1, 2, 0, 3), is_causal=True, enable_gqa=True
    )
    assert torch.equal(layer(x_TBD, tables), layer.output(mixed.permute(2, 0, 1, 3).flatten(2)))


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


@pytest.mark.parametrize(("order", "inner"), [(1, "self"), (2, "self"), (3, "self"), (3, "cross")])
def test_scores_within_one_text_have_at_most_the_rank_of_a_head(
    order: int, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refined or not, queries and keys are `HEAD` numbers each: what an order adds lies between texts."""
    scores = outer_scores(model_of(order, {"attention_inner": inner}), random(3 * HEAD, 2, 24), monkeypatch)
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


def test_heads_of_a_group_share_their_refined_key_in_the_self_form_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = {}
    for inner in ("self", "cross"):
        layer = Attention(model_of(2, {**GROUPED, "attention_inner": inner}), "a", ALONE)
        calls: list[tuple[Tensor | None, ...]] = []
        attend = layer._attend
        monkeypatch.setattr(layer, "_attend", lambda *given, a=attend, c=calls: c.append(given) or a(*given))
        layer(x_TBD := random(6, 1, 24), tables_of(x_TBD))
        shared[inner] = calls[-1][2].shape[1]
    assert shared == {"self": 1, "cross": 2}


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("inner", ["self", "cross"])
@pytest.mark.parametrize(
    "fields", first_by_default(1, [GROUPED, {}, {"projection": "linear_nexus"}]), ids=str
)
def test_closed_gates_are_order_1_and_a_gradient_reaches_each_of_them_at_once(
    fields: dict[str, object], inner: str, order: int
) -> None:
    fields = {**fields, "attention_inner": inner, "attention_gate": True}
    plain = DecoderStage(model_of(1, {**fields, "attention_gate": False}), ALL, ALONE)
    gated = DecoderStage(model_of(order, fields), ALL, ALONE)
    tokens = torch.randint(0, MODEL.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    # The same weights but for the gates, as initial values depend on names.
    assert (gated(tokens) - plain(tokens)).abs().max() < 1e-12
    Loss(MODEL, ALONE.tp, ALONE.shard)(gated(tokens), tokens.roll(-1, 1)).backward()
    gates = [p for spec, p in logical_parameters(gated).values() if spec.init == Constant(0.0)]
    assert len(gates) == 2 * MODEL.num_layers
    assert all((gate == 0).all() and (gate.grad != 0).all() for gate in gates)


def test_the_gradient_of_a_gate_is_the_one_found_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a = 0 that of a_n is the sum of dL/dQ_n * (A Q - Q)_n over tokens and channels, K alike."""
    model = model_of(2, {"attention_gate": True})
    layer, x_TBD = Attention(model, "layers.0.attention", ALONE), random(6, 2, 24)
    attend, calls = layer._attend, []
    monkeypatch.setattr(layer, "_attend", lambda *given: calls.append(given) or attend(*given))
    refine, refined = layer.refine, []
    forward = refine.forward

    def watched(*given: object) -> tuple[Tensor, Tensor]:
        sides = forward(*given)
        refined.extend(zip(given[:2], sides, strict=True))
        for side in sides:
            side.retain_grad()
        return sides

    monkeypatch.setattr(refine, "forward", watched)
    (layer(x_TBD, tables_of(x_TBD)) * random(6, 2, 24, seed=1)).sum().backward()
    for side, (before, after), call in zip("qk", refined, calls[:2], strict=True):
        read_TBNH = attend(*call).permute(2, 0, 1, 3)
        by_hand = (after.grad * (read_TBNH - before)).sum(dim=(0, 1, 3))
        found = refine.gates[f"{side}_gate"].weight.grad
        assert found.abs().min() > 1e-6
        assert torch.allclose(found, by_hand, rtol=1e-10, atol=0.0)


OLD_RUN = Path(__file__).parents[1] / "checkpoint" / "order2_of_old"
"""A run of three steps of the version before `attention_inner` was recorded, by its command."""


def test_a_checkpoint_from_before_the_inner_form_was_recorded_computes_as_it_did() -> None:
    folder = OLD_RUN / "iter_0000003"
    manifest = read_manifest(folder)
    assert "attention_inner" not in manifest.config["model"]
    model = RunConfig.from_dict(manifest.config).model
    assert (model.attention_order, model.attention_inner, model.attention_gate) == (2, "cross", False)
    loaded = load_model(folder, model, 8, torch.device("cpu"), torch.float64)
    logits = loaded.decoder(torch.tensor([[1, 5, 12, 0, 7, 7]]))[-1, 0]
    # What that version computed of it.
    expected = [-1.463931099319, 2.05714441626, 0.725508297246, -1.48076383765, 1.733565991289]
    expected += [0.392688654687, -1.409258792861, 0.941134676565, -0.814180010378, -2.012523718546]
    expected += [-3.2077966802, -0.276841881149, 0.849592776156]
    assert torch.allclose(logits, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-10)
    weights = {name: p.detach() for name, (_, p) in logical_parameters(loaded.decoder).items()}
    other = dataclasses.asdict(model) | {"attention_inner": "self"}
    moved = reference.logits(weights, torch.tensor([[1, 5, 12, 0, 7, 7]]), other)[0, -1] - logits
    assert moved.abs().max() > 1e-3, "the forms differ, so the law could fail"


def test_its_configuration_file_names_the_same_model_and_a_user_s_own_the_new_one(tmp_path: Path) -> None:
    values = read_config_file(OLD_RUN / "config.yaml")
    assert build(values).model == RunConfig.from_dict(read_manifest(OLD_RUN / "iter_0000003").config).model
    renamed = (OLD_RUN / "config.yaml").read_text().replace("preset: nexusformer-tiny", "preset: my-grown")
    (tmp_path / "renamed.yaml").write_text(renamed)
    assert build(read_config_file(tmp_path / "renamed.yaml")).preset == "my-grown"
    (tmp_path / "own.yaml").write_text("model: {attention_order: 2}")
    assert build(read_config_file(tmp_path / "own.yaml")).model.attention_inner == "self"


def test_a_checkpoint_of_order_1_is_still_its_preset() -> None:
    config = build({})
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    del saved["model"]["attention_inner"], saved["model"]["attention_gate"]
    assert RunConfig.from_dict(saved) == config

"""Law: a model of linear projections that is given Nexus-Ranks computes what it did, and all of it trains."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.run_dir import find_checkpoint
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.growth.request import with_empty_branch
from tests.support import checkpoints, reference
from tests.support.cases import first_by_default
from tests.support.verbs import CallVerb

QWEN3 = {"projection": "linear", "nexus_m": 0, "nexus_a": 0, "num_query_groups": 1, "qk_layernorm": True}
DEPTH = {"depth_init": "random"}
WIDTHS = {"nexus_m": 15, "nexus_a": 19}
TOLERANCE = 1e-12  # float64: sums that end in exact zeros


@pytest.mark.parametrize("init", first_by_default(1, ["in_rand", "out_rand"]))
def test_the_function_stays_every_new_weight_trains_and_the_branch_grows(init: str, tmp_path: Path) -> None:
    saved = checkpoints.configure(**QWEN3)
    source = checkpoints.write_checkpoint(tmp_path / "linear", saved, tp=2)
    tokens = checkpoints.sample(saved.model)
    before = reference.logits(checkpoints.weights(source), tokens, dataclasses.asdict(saved.model))
    made, after = checkpoints.grow(
        source, tmp_path / "nexified", with_empty_branch(saved), WIDTHS, init=init, workers=2
    )
    assert (after.model.projection, after.model.nexus_m, after.model.nexus_a) == ("linear_nexus", 15, 19)
    w = {name: t.requires_grad_() for name, t in checkpoints.weights(made).items()}
    new = {name for name in w if name.rpartition(".")[2] in ("w_m", "w_a", "w_d")}
    assert len(new) == 3 * 3 * saved.model.num_layers
    model = dataclasses.asdict(after.model)
    with torch.no_grad():
        assert (reference.logits(w, tokens, model) - before).abs().max() <= TOLERANCE
    reached = {name: torch.zeros(w[name].shape, dtype=torch.bool) for name in new}
    for _ in range(3):
        loss = reference.loss(w, tokens, tokens.roll(-1, 1), model)
        gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        with torch.no_grad():
            for name in new:
                reached[name] |= gradients[name] != 0
            for name, t in w.items():
                t -= 0.1 * gradients[name]
    assert all(there.all() for there in reached.values())
    assert {region.tensor for region in read_manifest(made).optimizer.grown_regions} == new

    larger = {"nexus_m": 20, "nexus_a": 26, "hidden_size": 14}
    again, last = checkpoints.grow(made, tmp_path / "larger", after, larger, init=init)
    logits = reference.logits(checkpoints.weights(again), tokens, dataclasses.asdict(last.model))
    assert (logits - before).abs().max() <= TOLERANCE


MODELS = {
    "nexus": {},
    "linear": {"projection": "linear", "nexus_m": 0, "nexus_a": 0},
    "qwen3": QWEN3,
    "grown heads": {**QWEN3, "base_kv_channels": 2},
}


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        pytest.param(kind, inner, marks=() if (kind, inner) == ("qwen3", "self") else pytest.mark.law)
        for kind in MODELS
        for inner in ("self", "cross")
    ],
)
def test_a_trained_model_gains_an_order_whose_gates_train_at_once_and_grows_on(
    kind: str, inner: str, tmp_path: Path
) -> None:
    saved = checkpoints.configure(**MODELS[kind])
    source = checkpoints.write_checkpoint(tmp_path / "order1", saved, tp=2 if kind == "nexus" else 1)
    tokens = checkpoints.sample(saved.model)
    before = reference.logits(checkpoints.weights(source), tokens, dataclasses.asdict(saved.model))
    # With heads and layers in the same step, or with nothing else.
    more = {"num_layers": 3, "num_attention_heads": 4, "ffn_hidden_size": 20} if kind == "qwen3" else {}
    more |= {"num_query_groups": 2} if kind == "qwen3" else {}
    sizes = {"attention_order": 2, **more}
    made, after = checkpoints.grow(
        source, tmp_path / "order2", saved, sizes, attention_inner=inner, workers=2, **(DEPTH if more else {})
    )
    assert (after.model.attention_order, after.model.attention_inner) == (2, inner)
    w = {name: t.requires_grad_() for name, t in checkpoints.weights(made).items()}
    gates = {name for name in w if name.endswith("_gate.weight")}
    assert len(gates) == 2 * after.model.num_layers
    model = dataclasses.asdict(after.model)
    with torch.no_grad():
        assert (reference.logits(w, tokens, model) - before).abs().max() <= TOLERANCE
    loss = reference.loss(w, tokens, tokens.roll(-1, 1), model)
    gradients = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
    if not more:
        assert all((gradients[name] != 0).all() and not w[name].any() for name in gates)
        assert {region.tensor for region in read_manifest(made).optimizer.grown_regions} == gates
    with torch.no_grad():  # open the gates, and grow what they made
        w = {name: t + (0.3 if name in gates else 0.0) for name, t in w.items()}
        moved = (reference.logits(w, tokens, model) - before).abs().max()
    assert moved > 1e-3

    larger = {"hidden_size": 14, "kv_channels": 6, "num_layers": 4}
    again, last = checkpoints.grow(made, tmp_path / "larger", after, larger, **DEPTH)
    logits = reference.logits(checkpoints.weights(again), tokens, dataclasses.asdict(last.model))
    assert (logits - before).abs().max() <= TOLERANCE


def test_the_tool_writes_verifies_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_verb: CallVerb
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.write_checkpoint(tmp_path / "linear", checkpoints.configure(**QWEN3))

    def run(words: str) -> tuple[int, str]:
        return call_verb("upcycle", words, "tools/upcycle_checkpoint.py")

    code, output = run("--load linear --save made --verify --workers 2")
    assert code == 0, output
    assert "verified in float64" in output
    config = RunConfig.from_dict(read_manifest(find_checkpoint(tmp_path / "made")).config)
    assert (config.model.nexus_m, config.model.nexus_a) == (15, 18)
    code, output = run("--load made --save higher --attention-order 2 --verify --tp 2")
    assert code == 2 and "--tp 2 does not divide --num-query-groups 1" in output, output
    code, output = run("--load made --save higher --attention-order 2 --verify")
    assert code == 0 and "verified in float64" in output, output
    config = RunConfig.from_dict(read_manifest(find_checkpoint(tmp_path / "higher")).config)
    assert (config.model.attention_order, config.model.attention_inner) == (2, "self")
    assert (config.model.attention_gate, config.model.nexus_m) == (True, 15), "no branch was asked for"
    code, output = run(
        "--load linear --save both --attention-order 3 --attention-inner cross --nexus-m 16 --verify"
    )
    assert code == 0 and "verified in float64" in output, output
    model = RunConfig.from_dict(read_manifest(find_checkpoint(tmp_path / "both")).config).model
    assert (model.projection, model.nexus_m, model.attention_order) == ("linear_nexus", 16, 3)
    code, output = run("--load higher --save again --attention-order 3")
    assert code == 2 and "only order 1 can be raised" in output, output
    code, output = run("--load made --save again --attention-order 1")
    assert code == 2 and "has these sizes already" in output, output
    code, output = run("--load linear --save again --attention-inner cross")
    assert code == 2 and "belongs to an --attention-order above the checkpoint's 1" in output, output
    code, output = run("--load made --save again")
    assert code == 2 and "tools/grow_sharded_checkpoint.py" in output, output
    assert not (tmp_path / "again").exists()

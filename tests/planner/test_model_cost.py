"""Costs by part add up to the whole, and the memory of a model's state is that of the whole plan."""

import pytest

from megatron_nexus.config.command_line import build
from megatron_nexus.config.presets import PRESETS, Value
from megatron_nexus.models.decoder import (
    decoder_specs,
    layer_parts,
)
from megatron_nexus.models.layer_context import DTYPES
from megatron_nexus.planner.memory import STATE, memory_table, plan_memory, plan_state, rank_groups
from megatron_nexus.planner.model_cost import model_cost, parameters_by_part
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.spec.param import Role
from tests.planner.small_model import SMALL
from tests.support.cases import first_by_default


def test_parts_add_up() -> None:
    for preset in PRESETS:
        config = build({"preset": preset})
        specs, cost = decoder_specs(config.model), model_cost(config)
        norms = parameter_count(spec for spec in specs.values() if spec.role is Role.VECTOR)
        assert cost.parts.get("norms", 0) == norms, preset
        assert {"embedding", "q", "k", "v", "output", "feed_forward", "head"} <= cost.parts.keys(), preset
        vocabulary = config.model.vocab_size * config.model.hidden_size
        assert cost.parts["embedding"] == cost.parts["head"] == vocabulary, preset
        assert sum(cost.parts.values()) == cost.parameters == cost.non_embedding + 2 * vocabulary, preset


def test_attention_alone_costs_more_in_a_longer_sample() -> None:
    for preset in PRESETS:
        config = build({"preset": preset})
        cost = model_cost(config)
        twice = model_cost(build({"preset": preset, "seq_length": 2 * config.training.seq_length}))
        assert twice.attention_flops == 2 * cost.attention_flops > 0, preset
        rest = cost.forward_flops - cost.attention_flops
        assert twice.forward_flops - twice.attention_flops == rest > 0, preset
        assert cost.training_flops == 3 * cost.forward_flops, "the backward pass costs two forward ones"


def test_parts_are_those_of_the_layers() -> None:
    model = build({"preset": "qwen3-tiny"}).model
    counts = parameters_by_part(model)
    by_hand = parameter_count(spec for layer in layer_parts(model)[1:-1] for spec in layer["k"])
    assert counts["k"] == by_hand == model.num_layers * model.key_width * model.hidden_size


@pytest.mark.parametrize(
    ("ranks", "flags"),
    first_by_default(
        2,
        [
            (4, {"precision": "bf16", "tensor_model_parallel_size": 2}),
            (2, {"precision": "fp32", "zero_stage": 3}),
            (1, {"precision": "bf16"}),
            (1, {"precision": "fp32"}),
            (4, {"precision": "fp32", "pipeline_model_parallel_size": 2, "padding_multiple": 8}),
            (2, {"precision": "bf16", "zero_stage": 2}),
            (2, {"precision": "fp32", "zero_stage": 2}),
            (2, {"precision": "bf16", "zero_stage": 3}),
        ],
    ),
    ids=str,
)
def test_the_state_of_a_rank_is_that_of_the_whole_plan(ranks: int, flags: dict[str, Value]) -> None:
    config = build({**SMALL, **flags})
    whole = plan_memory(config, ranks, "cpu")
    state = plan_state(config, ranks, "cpu")
    expected = [{name: memory.columns[name] for name in STATE} for memory in whole]
    if config.parallel.zero_stage >= 2 or config.training.precision == "bf16":
        # Of the gradients on their way into the bucket, or the fp32 ones, two may live at once: the
        # embedding's is the largest.
        passing = expected[0].pop("gradients") - (planned := dict(state.pop())).pop("gradients")
        assert 0 <= passing <= 2 * 301 * 32 * DTYPES[config.training.precision].itemsize
        state = [planned]
    assert state == expected


def test_ranks_that_hold_the_same_share_a_row() -> None:
    plan = [{"weights": 2**20}, {"weights": 2**20}, {"weights": 2**21}]
    assert [group[:2] for group in rank_groups(plan, 6)] == [(0, 3), (4, 5)]
    assert [line.split() for line in memory_table(plan, 3)] == [
        ["ranks", "weights"],
        ["0-1", "1.0"],
        ["2", "2.0"],
    ]

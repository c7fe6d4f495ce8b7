"""Blocks of a stage are alike: running few and repeating one is running all; and traces are made once."""

import pytest
import torch

from megatron_nexus.config.command_line import build
from megatron_nexus.config.presets import Value
from megatron_nexus.planner import trace as tracing
from megatron_nexus.planner.memory import plan_memory
from megatron_nexus.planner.trace import StageShape, trace
from tests.planner.small_model import SMALL

MODEL: dict[str, Value] = {**SMALL, "num_layers": 4}
KINDS: list[tuple[int, dict[str, Value], list[tuple[bool, bool]]]] = [
    (1, {"recompute_granularity": "full"}, [(True, True), (True, False), (False, True), (False, False)]),
    (
        2,
        {"attention_order": 2, "num_query_groups": 2, "qk_layernorm": True, "post_norm": True},
        [(True, True)],
    ),
    (1, {"reset_position_ids": True, "reset_attention_mask": True}, [(True, True)]),
]


@pytest.mark.parametrize(("tp_size", "kind", "ends"), KINDS, ids=str)
@pytest.mark.slow
def test_a_repeated_block_stands_for_all_blocks(
    tp_size: int, kind: dict[str, Value], ends: list[tuple[bool, bool]]
) -> None:
    config = build({**MODEL, **kind})
    for has_embedding, has_head in ends:
        shape = StageShape(
            model=config.model,
            has_embedding=has_embedding,
            has_head=has_head,
            tp_size=tp_size,
            sequence_parallel=tp_size > 1,
            micro_batch_size=2,
            seq_length=16,
            dtype=torch.float32,
            recompute=config.training.recompute_granularity,
            compiled=config.training.compile,
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask,
            device_type="cpu",
            multiple=1,
        )
        assert trace(shape) == tracing._run(shape), (has_embedding, has_head)


def test_another_data_parallel_size_zero_stage_or_batch_needs_no_new_trace() -> None:
    config = build({**MODEL, "precision": "fp32"})
    plan_memory(config, 1, "cpu")
    traced = tracing._run.cache_info().misses
    plans = []
    changes: list[dict[str, Value]] = [
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"global_batch_size": 16},
        {"num_layers": 9},
    ]
    for flags in changes:
        plans += plan_memory(build({**MODEL, "precision": "fp32", **flags}), 4, "cpu")
    assert tracing._run.cache_info().misses == traced
    assert len({plan.peak for plan in plans}) == len(plans)

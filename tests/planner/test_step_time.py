"""Laws of predictions: what is counted, what more of anything does, and a published grid."""

from dataclasses import replace

import pytest

from megatron_nexus.config.command_line import build
from megatron_nexus.config.devices import DEVICES, Device
from megatron_nexus.config.presets import PRESETS, Value
from megatron_nexus.models.decoder import layer_flops_per_token
from megatron_nexus.planner.dry_run import report
from megatron_nexus.planner.kernels import Kernel, Kind
from megatron_nexus.planner.layer_work import traced_work, work_by_micro_batch
from megatron_nexus.planner.memory import plan_memory
from megatron_nexus.planner.roofline import LAUNCH_S, roofline_of
from megatron_nexus.planner.step_time import (
    BUBBLE,
    DATA_PARALLEL,
    GRADIENTS,
    OPTIMIZER,
    SENDS,
    WAITS_FOR_HOST,
    step_time,
)
from megatron_nexus.planner.traffic import StageSize, Traffic, data_parallel_traffic
from tests.planner.small_model import SMALL
from tests.support.cases import first_by_default

H100 = DEVICES["h100"]
LARGE: dict[str, Value] = {"preset": "nexusformer-640m", "global_batch_size": 64}
LAYOUTS: list[tuple[int, dict[str, Value]]] = [
    (1, {}),
    (1, {"recompute_granularity": "selective", "compile": True}),
    (1, {"recompute_granularity": "full", "precision": "fp32"}),
    (16, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (16, {"pipeline_model_parallel_size": 4}),
    (8, {"zero_stage": 3}),
]
# A preset of each family, and forms that none has.
KINDS: dict[str, dict[str, Value]] = {
    **{name: {"preset": name} for name in PRESETS if name.endswith("-tiny")},
    "order 2": {"attention_order": 2, "num_query_groups": 2},
    "linear_nexus": {"projection": "linear_nexus"},
    "in one document": {"reset_attention_mask": True, "reset_position_ids": True},
}


@pytest.mark.torch_versions
@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.law)])
def test_flops_of_the_traced_kernels_are_those_of_the_specs(flags: dict[str, Value], compiled: bool) -> None:
    config = build({**flags, "padding_multiple": 1, "compile": compiled})
    work, training = traced_work(config), config.training
    counted = [sum(k.flops for k in layer.kernels) for layer in (work.embedding, work.block, work.head)]
    embedding, block, *_, head = layer_flops_per_token(config.model, training.seq_length)
    tokens = training.micro_batch_size * training.seq_length
    assert counted == [3 * tokens * flops for flops in (embedding, block, head)]


@pytest.mark.parametrize("preset", first_by_default(1, ["nexusformer-640m", "qwen3-640m"]))
def test_ranks_share_the_products_and_recompute_repeats_them(preset: str) -> None:
    large: dict[str, Value] = {"preset": preset, "global_batch_size": 64, "padding_multiple": 1}
    whole = traced_work(build(large)).block

    def flops(kind: Kind, **flags: Value) -> float:
        work = traced_work(build({**large, **flags})).block
        return sum(kernel.flops for kernel in work.kernels if kernel.kind is kind)

    for kind in (Kind.GEMM, Kind.ATTENTION):
        once = sum(kernel.flops for kernel in whole.kernels if kernel.kind is kind)
        assert flops(kind, tensor_model_parallel_size=4) == once / 4
        # The checkpoint ends before the last product, whose output backward does not need.
        assert once * 1.2 < flops(kind, recompute_granularity="full") <= once * 4 / 3
        assert flops(kind, recompute_granularity="selective") == once


@pytest.mark.parametrize("preset", ["nexusformer-tiny", "qwen3-tiny", "tokenformer-tiny"])
@pytest.mark.parametrize("recompute", first_by_default(1, ["none", "selective", "full"]))
def test_compiled_blocks_move_fewer_bytes_in_fewer_kernels(preset: str, recompute: str) -> None:
    flags: dict[str, Value] = {"preset": preset, "precision": "bf16", "recompute_granularity": recompute}
    eager, compiled = (traced_work(build({**flags, "compile": compiled})) for compiled in (False, True))
    for one, other in ((eager.block, compiled.block), (eager.head, compiled.head)):
        for number in ("moved", "count"):
            many, few = (
                sum(getattr(kernel, number) for kernel in work.kernels if kernel.kind is Kind.POINTWISE)
                for work in (one, other)
            )
            assert 0.05 * many < few < 0.9 * many, number


@pytest.mark.parametrize("size", first_by_default(1, [3, 8, 16]))
@pytest.mark.parametrize(
    "flags", first_by_default(1, [{}, {"compile": True, "preset": "tokenformer-640m"}]), ids=str
)
def test_work_is_affine_in_the_micro_batch(flags: dict[str, Value], size: int) -> None:
    config = build({**LARGE, **flags})
    traced = traced_work(replace(config, training=replace(config.training, micro_batch_size=size)))
    work = work_by_micro_batch(config)(size)
    for a, b in ((work.embedding, traced.embedding), (work.block, traced.block), (work.head, traced.head)):
        assert a.kept_bytes == pytest.approx(b.kept_bytes)
        for one, other in zip(a.kernels, b.kernels, strict=True):
            assert (one.kind, one.shape) == (other.kind, other.shape)
            numbers = [other.flops, other.moved, other.count]
            assert [one.flops, one.moved, one.count] == pytest.approx(numbers)


@pytest.mark.parametrize(("ranks", "flags"), LAYOUTS, ids=str)
def test_more_of_any_rate_is_never_slower(ranks: int, flags: dict[str, Value]) -> None:
    config = build({**LARGE, **flags})
    for name in ("bandwidth", "bf16", "fp32", "gemm", "nvlink", "network"):
        slower = step_time(config, ranks, H100).total_s
        for factor in (1.1, 1.2, 1.24):
            device = replace(H100, **{name: factor * getattr(H100, name)})
            faster = step_time(config, ranks, device).total_s
            assert faster <= slower, (name, factor)
            slower = faster


def test_a_step_of_one_rank_is_the_sum_of_its_kernels_gradients_and_optimizer() -> None:
    config = build(LARGE)
    time, roofline = step_time(config, 1, H100), roofline_of(H100, "bf16")
    kernels = [
        (times, kernel)
        for times, layer in traced_work(config).of_layers(range(26), 24)
        for kernel in layer.kernels
    ]
    expected = 16 * sum(times * roofline.seconds(kernel) for times, kernel in kernels)
    around = (GRADIENTS, WAITS_FOR_HOST, OPTIMIZER)
    assert time.total_s - sum(time.seconds[cause] for cause in around) == pytest.approx(expected)
    assert time.seconds.keys().isdisjoint({BUBBLE, SENDS, DATA_PARALLEL})
    assert time.tokens_per_s == pytest.approx(64 * 4096 / time.total_s)
    assert time.gemm_share * H100.gemm == pytest.approx(time.mfu)


def test_the_largest_product_reaches_the_rate_of_the_record() -> None:
    for device in DEVICES.values():
        seconds = roofline_of(device, "bf16")._product(1, 8192, 8192, 8192) - LAUNCH_S
        assert 2 * 8192**3 / seconds == pytest.approx(device.gemm_flops_per_s("bf16"), rel=0.03), device


def test_a_device_of_unknown_rates_has_memory_and_no_time() -> None:
    lines = report(build(SMALL), 1, Device("some GPU", memory=45, bf16=0, bandwidth=0))
    assert any("rates of some GPU are not known" in line for line in lines)
    assert not any("predicted" in line for line in lines)


def test_products_of_fp32_move_four_bytes_an_element_and_tf32_is_half_as_fast_as_bf16() -> None:
    thin = Kernel(Kind.GEMM, 2.0 * 8192 * 8192, shape=(1, 1, 8192, 8192))  # bound by the bandwidth
    two, four = (roofline_of(H100, products).seconds(thin) for products in ("bf16", "fp32"))
    assert four > 1.8 * two
    assert H100.peak_flops_per_s("tf32") == H100.peak_flops_per_s("bf16") / 2


def test_small_steps_wait_for_the_host() -> None:
    assert step_time(build(SMALL), 1, H100).share(WAITS_FOR_HOST) > 0.1
    assert step_time(build(LARGE), 1, H100).share(WAITS_FOR_HOST) == 0


def test_reduced_gradients_and_gathered_weights_are_six_bytes_a_parameter() -> None:
    """4 f of fp32 gradients, most during backward, and 2 f of bf16 weights; an all-reduce sends 4 f more."""
    size = StageSize(400_000_000, 300)

    def traffic(**flags: Value) -> Traffic:
        return data_parallel_traffic(build({**LARGE, **flags}), 16, size)

    share = 15 / 16 * size.elements
    together = traffic(overlap_grad_reduce=False)
    assert (together.exposed, together.beside_last_backward) == (6 * share, 0)
    overlapped = traffic()
    assert overlapped.exposed + overlapped.beside_last_backward == pytest.approx(6 * share)
    assert overlapped.exposed == pytest.approx((2 + 4 / 10) * share), "ten buckets of 40 million"
    assert traffic(zero_stage=2).exposed == 10 * share


@pytest.mark.parametrize(("ranks", "flags"), [(64, {}), (64, {"tensor_model_parallel_size": 2}), (8, {})])
def test_a_reduction_by_node_sends_as_much_and_less_across_nodes(ranks: int, flags: dict[str, Value]) -> None:
    """It is never slower on up to eight nodes, and beyond by the first stage of the last bucket at most."""
    size, config = StageSize(400_000_000, 300), {**LARGE, "sequence_parallel": True, **flags}
    flat = build({**config, "sequence_parallel": bool(flags)})
    by_node = replace(flat, parallel=replace(flat.parallel, hierarchical_grad_reduce=True))
    one, two = (data_parallel_traffic(of, ranks, size, node_size=8) for of in (flat, by_node))
    seconds = [step_time(of, ranks, H100).seconds[DATA_PARALLEL] for of in (flat, by_node)]
    if ranks == 8:
        assert one == two and seconds[0] == seconds[1], "one node"
        return
    sent, copies = two.by_node, flat.data_parallel_size(ranks)
    assert sent is not None and sent.near == 8 * copies // ranks
    assert two.exposed + sent.within + sent.across == pytest.approx(one.exposed + one.beside_last_backward)
    assert sent.across == 4 * size.elements * (ranks // 8 - 1) / copies
    assert seconds[1] < seconds[0]


@pytest.mark.parametrize("bucket", [0, 10_000_000])
def test_beyond_eight_nodes_the_first_stage_of_a_large_bucket_may_cost_what_the_second_saves(
    bucket: int,
) -> None:
    flat = build({**LARGE, "global_batch_size": 4096, "ddp_bucket_size": bucket})
    by_node = replace(flat, parallel=replace(flat.parallel, hierarchical_grad_reduce=True))
    one, two = (step_time(of, 1024, H100).seconds[DATA_PARALLEL] for of in (flat, by_node))
    largest = 4 * 7 / 8 * (bucket or 600_000_000)
    assert one - two < 0.1 * one
    assert two <= one + (largest / (0.8e9 * H100.nvlink) if not bucket else 0.0)


# The best layouts of a 1.34B model on nodes of eight H100, with a global batch of about 1M tokens: nodes,
# data, tensor and pipeline parallelism, MFU in percent. nanotron, in The Ultra-Scale Playbook (Hugging Face,
# 2025).
NANOTRON = [(2, 8, 1, 2, 41.6), (4, 16, 1, 2, 38.4), (8, 32, 1, 2, 32.5), (16, 64, 2, 1, 29.5)]
ONE_NODE = (4, 1, 2, 44.3)


@pytest.mark.parametrize(("nodes", "dp", "tp", "pp", "published"), NANOTRON)
def test_a_published_grid_scales_as_predicted(
    nodes: int, dp: int, tp: int, pp: int, published: float
) -> None:
    """MFU within 2 points up to 128 GPUs, from the MFU of one node alone: the rest is bubble and gradients.

    256 samples a step and micro-batches of one are assumed, and 6 bytes a parameter sent between nodes after
    the last backward pass.
    """
    parameters, tokens, world = 1.34e9, 1.05e6, 8 * nodes
    base = ONE_NODE[3] / 100 * (1 + (ONE_NODE[2] - 1) / (256 / ONE_NODE[0]))
    # PaLM's count: 6 FLOPs a parameter, a fifth more for the attention over 4,096 tokens.
    flops_per_s = world * H100.peak_flops_per_s("bf16")
    computed_s = 1.2 * 6 * parameters * tokens / flops_per_s / base * (1 + (pp - 1) / (256 / dp))
    sent = 6 * parameters / (tp * pp) * (dp - 1) / dp
    sent_s = roofline_of(H100, "bf16").link_seconds(sent, 0, dp, world)
    predicted = 1.2 * 6 * parameters * tokens / flops_per_s / (computed_s + sent_s)
    assert abs(100 * predicted - published) <= 2


def test_an_accelerator_keeps_no_fp32_copies_and_pads_to_64() -> None:
    config = build({"preset": "transformer++-640m", "global_batch_size": 64})
    assert config.model.ffn_hidden_size % 64
    cpu, gpu = (plan_memory(config, 1, kind)[0].columns for kind in ("cpu", "cuda"))
    assert gpu["weights"] > cpu["weights"]
    # An fp32 copy at least of the input of each of two norms in 24 blocks, and of the last one.
    copies = (2 * config.model.num_layers + 1) * 4 * 4 * 4096 * config.model.hidden_size
    assert 1.5 * copies > cpu["activations"] - gpu["activations"] > 0.9 * copies
    stage_2 = build({**LARGE, "zero_stage": 2})
    whole_bucket = 2 * 500_000_000
    assert plan_memory(stage_2, 8, "cuda")[0].columns["gradients"] >= whole_bucket
    assert plan_memory(build({**SMALL, "zero_stage": 2}), 8, "cpu")[0].columns["gradients"] < whole_bucket


def test_gradients_of_zero_1_are_reduce_scattered_behind_the_last_backward_pass() -> None:
    size, ranks = StageSize(100_000_000, tensors=10), 8
    flags = {"precision": "bf16", "global_batch_size": 64}
    during, after = (
        data_parallel_traffic(build({**flags, "overlap_grad_reduce": overlap}), ranks, size)
        for overlap in (True, False)
    )
    share = (ranks - 1) / ranks * size.elements
    assert after.exposed == during.exposed + during.beside_last_backward == pytest.approx((4 + 2) * share)
    # The last of buckets of 40 million is complete when the pass ends.
    assert during.beside_last_backward == pytest.approx(0.6 * 4 * share)

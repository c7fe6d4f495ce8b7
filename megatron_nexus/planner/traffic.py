"""What data-parallel ranks send one another in an optimizer step: the one place that counts these bytes."""

from dataclasses import dataclass

from megatron_nexus.config.deepspeed_config import bucket_elements, deepspeed_config, engine_reduces_gradients
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.layer_context import DTYPES

FP32 = 4


@dataclass(frozen=True)
class ByNode:
    """Bytes that a rank sends to reduce gradients within its node first, then across nodes."""

    near: int
    """Data-parallel ranks of a node."""
    within: float
    across: float
    last_bucket: float
    """Share of the last bucket, which nothing hides."""
    buckets: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in an optimizer step, in a ring of all data-parallel ranks but `by_node`."""

    exposed: float
    """While nothing is computed."""
    beside_all: float
    """Overlapping the forward and backward passes of all micro-batches."""
    beside_last_backward: float
    """Overlapping the last micro-batch's backward pass alone."""
    messages: int
    by_node: ByNode | None = None


@dataclass(frozen=True)
class StageSize:
    """What a rank holds of its stage."""

    elements: int
    """Number of all its parameters, padding included."""
    tensors: int


HIDDEN_BY_ZERO_3 = 0.5
"""Share of ZeRO 3's traffic that overlaps computation: a guess, its prefetching is not modelled."""


def near_copies(config: RunConfig, world_size: int, node_size: int) -> int:
    """Return how many data-parallel ranks of a node of `node_size` ranks reduce gradients first; 1: none.

    As `parallel.mesh` has it, which refuses stages that are not whole nodes: those are planned without.
    """
    tp, copies = config.parallel.tensor_model_parallel_size, config.data_parallel_size(world_size)
    near = min(node_size, copies * tp) // tp
    whole = node_size % tp == 0 and copies % max(1, near) == 0
    return near if config.parallel.hierarchical_grad_reduce and whole and 1 < near < copies else 1


def data_parallel_traffic(config: RunConfig, world_size: int, size: StageSize, node_size: int = 1) -> Traffic:
    """Return what a rank of a stage sends; `node_size` ranks share a node.

    f = (d - 1) / d of d data-parallel ranks. An all-reduce sends 2 f bytes a byte, a reduce-scatter or an
    all-gather f. A reduction by nodes of L sends 1 - 1 / L within them and 1 / L - 1 / d across, together f.
    """
    copies = config.data_parallel_size(world_size)
    stage, width = max(1, config.parallel.zero_stage), DTYPES[config.training.precision].itemsize
    settings = deepspeed_config(config, world_size, "cuda")
    summed = FP32 if settings["communication_data_type"] == "fp32" else 2
    micro_batches = config.accumulation_steps(world_size)
    share = (copies - 1) / copies * size.elements
    weights = width * share
    if stage == 3:
        # Weights are gathered in forward and in backward, gradients reduce-scattered, overlapping both.
        sent = micro_batches * (2 * weights + summed * share)
        hidden = HIDDEN_BY_ZERO_3 * sent
        return Traffic(sent - hidden, hidden, 0.0, micro_batches * 3 * size.tensors)
    if stage == 2:
        return Traffic(micro_batches * 2 * summed * share + weights, 0.0, 0.0, micro_batches + 1)
    if not engine_reduces_gradients(settings):
        return Traffic(2 * summed * share + weights, 0.0, 0.0, 2)
    # Reduce-scattered by buckets, of which the last one is complete when the backward pass ends.
    bucket = min(bucket_elements(config, world_size, settings) or size.elements, size.elements)
    last = bucket / size.elements if size.elements else 1.0
    buckets = -(-size.elements // max(1, bucket))
    if (near := near_copies(config, world_size, node_size)) > 1:
        within, across = (summed * size.elements * part for part in (1 - 1 / near, 1 / near - 1 / copies))
        return Traffic(weights, 0.0, 0.0, buckets, ByNode(near, within, across, last, buckets))
    return Traffic(weights + last * summed * share, 0.0, (1 - last) * summed * share, 2 * buckets)


def copied_bytes(config: RunConfig, world_size: int) -> int:
    """Return bytes a parameter that are moved to bring gradients together for DeepSpeed's own reduction."""
    return 0 if engine_reduces_gradients(deepspeed_config(config, world_size, "cuda")) else 4 * FP32

"""Predicted seconds of an optimizer step: the kernels of the traced model on a device, and what is around.

    step = (m + pp - 1) x (the slowest stage's micro-batch + its sends) + data-parallel traffic + optimizer

m micro-batches. A micro-batch takes as long as its kernels on the device, or as the host needs to launch
them. A prediction, not measured: docs/planning.md says what it rests on.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_nexus.config.devices import Device
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.decoder import training_flops_per_token
from megatron_nexus.planner.kernels import Kind
from megatron_nexus.planner.layer_work import Work, traced_work
from megatron_nexus.planner.memory import stage_parameters, stage_ranges, stage_shape
from megatron_nexus.planner.roofline import HOST_S, Roofline, roofline_of
from megatron_nexus.planner.traffic import ByNode, StageSize, copied_bytes, data_parallel_traffic

GRADIENTS = "gradients into fp32"
WAITS_FOR_HOST = "waiting for the host"
BUBBLE, SENDS = "pipeline bubble", "pipeline communication"
DATA_PARALLEL, OPTIMIZER = "data-parallel communication", "optimizer"
DEEPSPEED_S = 2.8e-3
"""Host time of DeepSpeed's own work on a micro-batch, measured on a CPU."""
STEP_S = 1.5e-3
"""Host time of a step: norm and loss are read, the next step is prepared."""
# Bytes a parameter that a gradient moves as it is added to the sum, in fp32.
ACCUMULATED = {"bf16": 10, "fp32": 12}
# Of this rank's partition: norm 4, clip 8, Adam 28, cast 6. Of all: weights copied out of the gathered ones.
OWN_BYTES, ALL_BYTES = 46, 10
BACKWARD_SHARE = 2 / 3
"""Share of a micro-batch's time that its backward pass takes."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step by cause, and what they mean."""

    seconds: Mapping[str, float]
    tokens: int
    flops_per_token: int
    peak_flops_per_s: float
    gemm_flops_per_s: float

    @cached_property
    def total_s(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all ranks."""
        return self.tokens / self.total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs over the data sheet's peak."""
        return self.tokens_per_s * self.flops_per_token / self.peak_flops_per_s

    @property
    def gemm_share(self) -> float:
        """Model FLOPs over what large products reach."""
        return self.tokens_per_s * self.flops_per_token / self.gemm_flops_per_s

    def share(self, cause: str) -> float:
        """Return the part of the step that a cause takes."""
        return self.seconds.get(cause, 0.0) / self.total_s


def step_time(config: RunConfig, world_size: int, device: Device, work: Work | None = None) -> StepTime:
    """Return the predicted time of a step on `world_size` devices; `work` if it is known already."""
    training, parallel = config.training, config.parallel
    pp = parallel.pipeline_model_parallel_size
    roofline = roofline_of(device, training.product_precision)
    work = work or traced_work(config)
    micro_batches, copies = config.accumulation_steps(world_size), config.data_parallel_size(world_size)
    stages = [_micro_batch(config, layers, roofline, work) for layers in stage_ranges(config)]
    slowest = max((spent for spent, _ in stages), key=lambda spent: sum(spent.values()))
    size = max((size for _, size in stages), key=lambda size: size.elements)
    micro_batch_s = sum(slowest.values())
    seconds = {cause: micro_batches * one for cause, one in slowest.items()}
    if pp > 1:
        # Activations one way and their gradient the other.
        sent = 2 * stage_shape(config, range(2), "cuda").output_bytes
        seconds[SENDS] = (micro_batches + pp - 1) * roofline.link_seconds(sent, 2, 2, world_size)
        seconds[BUBBLE] = (pp - 1) * micro_batch_s
    if copies > 1:
        seconds[DATA_PARALLEL] = _data_parallel(config, world_size, roofline, size, micro_batch_s)
    touched = (OWN_BYTES / copies + ALL_BYTES + copied_bytes(config, world_size)) * size.elements
    seconds[OPTIMIZER] = touched / roofline.bandwidth + STEP_S
    return StepTime(
        seconds,
        training.global_batch_size * training.seq_length,
        training_flops_per_token(config.model, training.seq_length),
        world_size * device.peak_flops_per_s(training.product_precision),
        world_size * device.gemm_flops_per_s(training.product_precision),
    )


def model_seconds(config: RunConfig, device: Device) -> float:
    """Return the predicted seconds of forward and backward of a micro-batch of a whole model, on one device.

    Without an engine: gradients stay where backward leaves them.
    """
    roofline, work = roofline_of(device, config.training.product_precision), traced_work(config)
    layers = work.of_layers(range(config.model.num_layers + 2), config.model.num_layers)
    kernels = [(times, kernel) for times, layer in layers for kernel in layer.kernels]
    return max(
        sum(times * roofline.seconds(kernel) for times, kernel in kernels),
        HOST_S * sum(times * kernel.count for times, kernel in kernels),
    )


def _micro_batch(
    config: RunConfig, layers: range, roofline: Roofline, work: Work
) -> tuple[Mapping[str, float], StageSize]:
    """Return seconds by cause of a stage's micro-batch, and what a rank of it holds."""
    tp, precision = config.parallel.tensor_model_parallel_size, config.training.precision
    held = [p.elements for layer in stage_parameters(config, layers, "cuda") for p in layer.values()]
    size = StageSize(sum(held), len(held))
    spent: dict[str, float] = defaultdict(float)
    spent[GRADIENTS] = ACCUMULATED[precision] * size.elements / roofline.bandwidth
    launched = 0.0
    for times, layer in work.of_layers(layers, config.model.num_layers):
        for kernel in layer.kernels:
            spent[kernel.kind] += times * roofline.seconds(kernel, tp)
            launched += times * kernel.count
    spent[WAITS_FOR_HOST] = max(0.0, HOST_S * launched + DEEPSPEED_S - sum(spent.values()))
    return spent, size


def _data_parallel(
    config: RunConfig, world_size: int, roofline: Roofline, size: StageSize, micro_batch_s: float
) -> float:
    """Return the seconds in which data-parallel ranks send and nothing is computed."""
    traffic = data_parallel_traffic(config, world_size, size, int(roofline.device.gpus_per_node))
    copies, tp = config.data_parallel_size(world_size), config.parallel.tensor_model_parallel_size
    spanned, backward_s = copies * tp, BACKWARD_SHARE * micro_batch_s

    def seconds(sent: float, messages: float = 0) -> float:
        return roofline.link_seconds(sent, messages, copies, spanned)

    computed_s = config.accumulation_steps(world_size) * micro_batch_s
    exposed_s = (
        seconds(traffic.exposed, traffic.messages)
        + max(0.0, seconds(traffic.beside_all) - computed_s)
        + max(0.0, seconds(traffic.beside_last_backward) - backward_s)
    )
    if traffic.by_node is None:
        return exposed_s
    return exposed_s + _reduction_by_node(traffic.by_node, roofline, copies, tp, backward_s)


def _reduction_by_node(sent: ByNode, roofline: Roofline, copies: int, tp: int, backward_s: float) -> float:
    """Return the exposed seconds of gradients that are reduced within nodes, then across.

    Of a ring over all ranks a node sends out as much as one of its ranks does (NCCL: docs/performance.md);
    here it sends what its ranks do together. A bucket's first stage overlaps the second of the one before.
    """

    def across(share: float, messages: int) -> float:
        return roofline.link_seconds(
            share * sent.near * sent.across, messages, copies // sent.near, copies * tp
        )

    within_s = roofline.link_seconds(sent.last_bucket * sent.within, sent.buckets, sent.near, sent.near * tp)
    hidden_s = across(1 - sent.last_bucket, 0)
    return within_s + across(sent.last_bucket, sent.buckets) + max(0.0, hidden_s - backward_s)


COMMUNICATION = {"bubble": (BUBBLE,), "TP": (Kind.COLLECTIVE,), "PP": (SENDS,), "DP": (DATA_PARALLEL,)}


def cause_line(time: StepTime) -> str:
    """Return what of a step the layout costs, as "bubble 6 %, TP 0 %, PP 0 %, DP 9 %"."""
    return ", ".join(
        f"{name} {100 * sum(map(time.share, causes)):.0f} %" for name, causes in COMMUNICATION.items()
    )

"""Trace: what one micro-batch allocates, frees and computes on a pipeline stage, recorded once.

The stage is built from the real model code on tensors without elements, and runs forward and backward. So
what autograd keeps, what recompute repeats and what sequence parallelism splits is never stated a second
time. All blocks of a stage are alike: one that has others on both sides stands for all of those.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.run_config import Recompute
from megatron_nexus.models.decoder import DecoderStage, Loss
from megatron_nexus.models.layer_context import LayerContext, computes_attention_backward, groups_projections
from megatron_nexus.models.packing import Stream
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.models.rotary import rotary_tables, stage_tables
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.planner.accelerator_kernels import accelerator_kernels, cross_entropy_kernel
from megatron_nexus.planner.kernels import Fusion, Kernel, merged
from megatron_nexus.planner.linear_loss import LinearLoss
from megatron_nexus.planner.tracker import Events, FakeProcessGroup, Mark, Tracker
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box, Shard

KEPT = "the stage's output is kept"
"""Event: at the last stage the pipeline engine keeps the outputs of two micro-batches, and frees a third."""


@dataclass(frozen=True)
class StageShape:
    """All that decides the activations of a stage: `model` has as many layers as the stage has blocks."""

    model: ModelConfig
    has_embedding: bool
    has_head: bool
    tp_size: int
    sequence_parallel: bool
    micro_batch_size: int
    seq_length: int
    dtype: torch.dtype
    recompute: Recompute
    compiled: bool
    reset_position_ids: bool
    reset_attention_mask: bool
    device_type: str
    multiple: int
    linear_loss: bool = False
    """Whether head and loss are one."""

    @property
    def is_packed(self) -> bool:
        """Whether positions go along with the activations."""
        return self.reset_position_ids or self.reset_attention_mask

    @property
    def first_has_its_own(self) -> bool:
        """Whether the first block's events differ: its input comes from another stage, or tables go along."""
        return not self.has_embedding or self.is_packed

    @property
    def last_has_its_own(self) -> bool:
        """Whether the last block's events differ."""
        return not self.has_head or self.is_packed

    @property
    def layers(self) -> range:
        """The layers of the stage in a decoder of these blocks alone."""
        return range(not self.has_embedding, self.model.num_layers + 1 + self.has_head)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.seq_length

    @property
    def output_bytes(self) -> int:
        """Bytes of the activations that stages send each other."""
        return prod(self.output_shape) * self.dtype.itemsize

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """[T, B, D] of the activations that stages send each other."""
        tokens = self.seq_length // (self.tp_size if self.sequence_parallel else 1)
        return tokens, self.micro_batch_size, self.model.hidden_size


@dataclass(frozen=True)
class Span:
    """A part of a pass: its events and its kernels."""

    events: Events
    kernels: Sequence[Kernel]


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass: what comes before the layers, and each layer in the order run."""

    before: Span
    layers: Sequence[Span]

    def repeated(self, index: int, times: int) -> "Pass":
        """Return the pass with `times` copies more of the layer `index`."""
        return Pass(self.before, [*self.layers[:index], *[self.layers[index]] * times, *self.layers[index:]])


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch's two passes, and what stays when it is over."""

    forward: Pass
    backward: Pass
    table_bytes: int
    """Bytes of the rotary tables, which all micro-batches share."""
    kept_bytes: int
    """Bytes of an output that the pipeline engine keeps."""


class _EmptyShard(Shard):
    """A shard of the same shapes whose parameters are left empty: no initial value is drawn."""

    def box(self, spec: ParamSpec) -> Box:
        none = (0,) * len(spec.axes)
        return Box(none, none)


class _Stage:
    """A stage that runs a micro-batch as DeepSpeed's engine does."""

    def __init__(self, shape: StageShape, tracker: Tracker) -> None:
        self.shape = shape
        self.tracker = tracker
        fake = FakeProcessGroup(shape.tp_size, tracker)
        group = cast(dist.ProcessGroup, fake) if shape.tp_size > 1 else None
        tp = TensorParallel(group, shape.sequence_parallel)
        shard = _EmptyShard(0, shape.tp_size, shape.multiple)
        context = LayerContext(
            tp,
            shard,
            seed=0,
            dtype=shape.dtype,
            recompute=shape.recompute,
            reset_position_ids=shape.reset_position_ids,
            reset_attention_mask=shape.reset_attention_mask,
            group_projections=groups_projections(shape.compiled, shape.dtype, shape.device_type),
            attention_backward=computes_attention_backward(shape.compiled, shape.dtype, shape.device_type),
            ends_before_head=shape.linear_loss,
        )
        self.decoder = DecoderStage(shape.model, shape.layers, context)
        self.loss: Loss | LinearLoss = Loss(shape.model, tp, shard)
        if shape.linear_loss:
            self.loss = LinearLoss(self.decoder, tp)
        elif shape.dtype == torch.bfloat16 or shape.compiled:
            self.loss.kernel = cross_entropy_kernel(tracker.record, shape.compiled)
        self.fusion = Fusion()
        self.marks: list[Mark] = []
        for layer in self.decoder.layers:
            layer.register_forward_pre_hook(lambda *_: self._mark())
            layer.register_forward_hook(lambda _module, _inputs, output: self._mark_backward(output))
        for name, (_, parameter) in logical_parameters(self.decoder).items():
            self.tracker.parameters.add(parameter.untyped_storage())
            local = name.split(".", 2)[2] if name.startswith("layers.") else name
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, local=local: self.tracker.take_gradient(parameter, local)
            )

    def _mark(self) -> None:
        self.marks.append(self.tracker.mark())

    def _mark_backward(self, output: Tensor | tuple[Tensor, ...]) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        tensor.register_hook(lambda _: self._mark())

    def _pass(self, is_block: Sequence[bool]) -> Pass:
        self._mark()
        # The last layer has what follows it too, as the loss.
        spans = []
        for mark, is_fused in zip(self.marks, [False, *is_block], strict=True):
            kernels: Iterable[Kernel] = (one.kernel for one in mark.operations)
            if is_fused and self.shape.compiled:
                kernels = self.fusion.kernels(mark.operations)
            spans.append(Span(mark.events, merged(kernels)))
        self.marks.clear()
        return Pass(spans[0], spans[1:])

    def micro_batch(self) -> MicroBatch:
        """Run a micro-batch forward and backward."""
        shape, log = self.shape, self.tracker.log
        shape_BT = (shape.micro_batch_size, shape.seq_length)
        labels_BT = torch.zeros(shape_BT, dtype=torch.int64)
        received = torch.empty(shape.output_shape, dtype=shape.dtype)
        log.clear()
        stage_tables(shape.model, shape.seq_length, received)
        table_bytes = sum(size for size in log if isinstance(size, int))
        log.clear()
        self.tracker.operations.clear()
        source: Tensor | None = None
        x = torch.zeros(shape_BT, dtype=torch.int64)
        if not shape.has_embedding:
            source = torch.empty(shape.output_shape, dtype=shape.dtype).requires_grad_()
            x = source.clone()  # the pipeline engine does
        stream: Stream = (x, torch.zeros(shape_BT, dtype=torch.int64)) if shape.is_packed else x
        result = self.decoder(stream)
        output = result[0] if isinstance(result, tuple) else result
        del x, stream, result
        kept: list[Tensor] = []
        if shape.has_head:
            if not shape.has_embedding:
                kept.append(output.detach())
                log.append(KEPT)
            output = self.loss(output, labels_BT)
        is_block = [0 < index <= shape.model.num_layers for index in shape.layers]
        forward = self._pass(is_block)
        output.backward(None if shape.has_head else received)
        del source, output
        kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept)
        return MicroBatch(forward, self._pass(is_block[::-1]), table_bytes, kept_bytes)


@contextlib.contextmanager
def _without_elements(shape: StageShape, tracker: Tracker) -> Iterator[None]:
    """Have tensors hold nothing, and kernels be those of the device: a CPU's own, or an accelerator's."""
    if shape.device_type == "cpu":
        from torch._subclasses.fake_tensor import FakeTensorMode  # half a second

        with FakeTensorMode(), torch.device("cpu"):
            yield
    else:
        with torch.device("meta"), accelerator_kernels(tracker.record):
            yield


@lru_cache(maxsize=1024)
def _run(shape: StageShape) -> MicroBatch:
    rotary_tables.cache_clear()  # real tables would not be counted
    tracker = Tracker()
    with _without_elements(shape, tracker):
        stage = _Stage(shape, tracker)
        with tracker:
            traced = stage.micro_batch()
    rotary_tables.cache_clear()  # nor may a run ever see these
    return traced


def trace(shape: StageShape) -> MicroBatch:
    """Return what a micro-batch allocates on a stage; the run of few blocks is cached."""
    blocks = shape.model.num_layers
    few = min(blocks, 1 + shape.first_has_its_own + shape.last_has_its_own)
    traced = _run(replace(shape, model=replace(shape.model, num_layers=few)))
    if few == blocks:
        return traced
    # Layers in the order run: forward the embedding and then the first block, backward the head and the last.
    forward = traced.forward.repeated(shape.has_embedding + shape.first_has_its_own, blocks - few)
    backward = traced.backward.repeated(shape.has_head + shape.last_has_its_own, blocks - few)
    return replace(traced, forward=forward, backward=backward)

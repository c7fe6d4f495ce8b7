"""Memory plan: what each rank of a run will hold, found by going through an optimizer step without data.

The stage of a rank is built from the real model code on fake tensors, which have shapes and lifetimes but
no elements, and runs forward and backward in the engine's order. What autograd keeps, what recompute drops
and what sequence parallelism splits is so never stated a second time. What DeepSpeed allocates around it
is: in `engine_memory`.

P parameters in this rank's memory, d data-parallel copies; all sizes in bytes.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.decoder import DecoderStage, Loss, layer_specs, stage_layers
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.packing import Stream
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.models.rotary import rotary_tables
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box, Shard
from megatron_nexus.training.engine_memory import Block, EngineMemory, Memory, engine_memory_of
from megatron_nexus.training.machine import DTYPES

COLUMNS = ("weights", "gradients", "optimizer", "activations", "buffers")
STATE = COLUMNS[:3]


@dataclass(frozen=True)
class RankMemory:
    """What a rank holds: the most of each column, and the most of all at one moment, which is less."""

    columns: Mapping[str, int]
    peak: int


class _Watch(TorchDispatchMode):
    """Counts the storage of every tensor that an operation makes, from then until the tensor is gone."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory
        self.blocks: weakref.WeakKeyDictionary[torch.UntypedStorage, Block] = weakref.WeakKeyDictionary()
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.blocks and storage not in self.known:
                    block = self.memory.hold("activations", storage.nbytes())
                    self.blocks[storage] = block
                    weakref.finalize(storage, self.memory.drop, block)
        return result


class _Peers:
    """A tensor-parallel group whose other ranks do not exist: its collectives return at once."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0

    def allreduce(self, *arguments: object) -> None: ...

    # The last two are called by torch before 2.13.
    all_gather_single = reduce_scatter_single = _allgather_base = _reduce_scatter_base = allreduce


class _Unfilled(Shard):
    """A shard of the same shapes whose parameters are left empty: no initial value is drawn."""

    def box(self, spec: ParamSpec) -> Box:
        none = (0,) * len(spec.axes)
        return Box(none, none)


def plan_memory(config: RunConfig, world_size: int, device: torch.device, multiple: int) -> list[RankMemory]:
    """The memory of each pipeline stage's ranks: of the one that holds most, where they differ (ZeRO 2).

    `multiple` is the alignment of split axes, in elements.
    """
    stages = config.parallel.pipeline_model_parallel_size
    return [_plan_stage(config, world_size, device, multiple, stage, stages) for stage in range(stages)]


def plan_state(
    config: RunConfig, world_size: int, device: torch.device, multiple: int
) -> list[Mapping[str, int]]:
    """The columns STATE of `plan_memory` alone, at once: no step of the model is gone through.

    Not counted is what lives for a moment: gradients on their way into the bucket of ZeRO 2 and 3, or of bf16
    into the fp32 ones.
    """
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    layers = layer_specs(model)
    shard = Shard(0, config.parallel.tensor_model_parallel_size, multiple)
    dtype = DTYPES[config.training.precision]
    plan: list[Mapping[str, int]] = []
    for stage in range(stages):
        parameters = [
            (spec, nn.Parameter(torch.empty(shard.local_shape(spec), dtype=dtype, device="meta")))
            for index in stage_layers(model, config.training.seq_length, stage, stages)
            for spec in layers[index]
        ]
        memory = Memory()
        engine = engine_memory_of(config)(memory, config, world_size, parameters, device)
        engine.start()
        passes = min(2, config.accumulation_steps(world_size))  # the second adds to what the first leaves
        for index in range(passes):
            engine.before_backward()
            for _, parameter in parameters:
                parameter.grad = made = torch.empty_like(parameter)
                engine.gradient(parameter)
                if parameter.grad is made and index == 0:  # neither copied away nor added to the first one
                    memory.hold("gradients", made.nbytes)
            engine.after_backward(last=index == passes - 1)
        engine.step()
        plan.append({name: memory.most[name] for name in STATE})
    return plan


def _plan_stage(
    config: RunConfig, world_size: int, device: torch.device, multiple: int, stage: int, stages: int
) -> RankMemory:
    memory = Memory()
    rotary_tables.cache_clear()  # real tables would not be counted
    with FakeTensorMode(), device:
        step = _Step(config, device, multiple, stage, stages)
        engine = engine_memory_of(config)(memory, config, world_size, step.parameters, device)
        engine.start()
        watch = _Watch(memory)
        for _, parameter in step.parameters:
            watch.known.add(parameter.untyped_storage())
        # The second step has the moments, which the first one makes.
        for _ in range(2):
            step.run(watch, engine, config.accumulation_steps(world_size))
    rotary_tables.cache_clear()  # nor may a run ever see these
    return RankMemory({name: memory.most[name] for name in COLUMNS}, memory.peak)


class _Step:
    """The model's part of an optimizer step on one stage."""

    def __init__(
        self, config: RunConfig, device: torch.device, multiple: int, stage: int, stages: int
    ) -> None:
        model, training = config.model, config.training
        tp_size = config.parallel.tensor_model_parallel_size
        group = cast(dist.ProcessGroup, _Peers(tp_size)) if tp_size > 1 else None
        tp = TensorParallel(group, config.parallel.sequence_parallel)
        shard = _Unfilled(0, tp_size, multiple)
        context = LayerContext(
            tp,
            shard,
            seed=0,
            dtype=DTYPES[training.precision],
            recompute=training.recompute_granularity,
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask,
        )
        self.packed = config.data.reset_position_ids or config.data.reset_attention_mask
        self.stage, self.stages = stage, stages
        self.layers = stage_layers(model, training.seq_length, stage, stages)
        self.decoder = DecoderStage(model, self.layers, context)
        self.parameters = list(logical_parameters(self.decoder).values())
        self.loss = Loss(model, tp, shard)
        self.shape_BT = (training.micro_batch_size, training.seq_length)
        tokens = training.seq_length // (tp.size if tp.sequence_parallel else 1)
        self.shape_TBD = (tokens, training.micro_batch_size, model.hidden_size)
        self.dtype = context.dtype

    def run(self, watch: _Watch, engine: EngineMemory, micro_batches: int) -> None:
        """Forward and backward of `micro_batches`, and the optimizer; 1F1B over pipeline stages."""
        in_flight = min(self.stages - self.stage, micro_batches)
        micro_batches = min(micro_batches, in_flight + 2)  # from there on each is like the one before
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: self._gradient(parameter, watch, engine)
            )
            for _, parameter in self.parameters
        ]
        with watch:
            labels_BT = torch.zeros(self.shape_BT, dtype=torch.int64)
            # The engine receives each way into one buffer, and keeps two sets of outputs at the last stage.
            received = [torch.empty(self.shape_TBD, dtype=self.dtype)] * (self.stage > 0)
            if self.stage < self.stages - 1:
                received.append(torch.empty(self.shape_TBD, dtype=self.dtype))
            kept: list[Tensor] = []
            waiting: list[tuple[Tensor | None, Tensor]] = []
            for index in range(micro_batches + in_flight - 1):
                if index < micro_batches:
                    waiting.append(self._forward(labels_BT, kept))
                if index >= in_flight - 1:
                    source, output = waiting.pop(0)
                    engine.before_backward()
                    output.backward(received[-1] if self.stage < self.stages - 1 else None)
                    del source, output
                    engine.after_backward(last=index == micro_batches + in_flight - 2)
        engine.step()
        for hook in hooks:
            hook.remove()

    def _forward(self, labels_BT: Tensor, kept: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        source: Tensor | None = None
        stream: Stream
        if self.stage > 0:
            source = torch.empty(self.shape_TBD, dtype=self.dtype).requires_grad_()
            stream = source.clone()  # the pipeline engine does
        else:
            stream = torch.zeros(self.shape_BT, dtype=torch.int64)
        if self.packed:
            stream = (stream, torch.zeros(self.shape_BT, dtype=torch.int64))
        result = self.decoder(stream)
        output = result[0] if isinstance(result, tuple) else result
        if self.stage < self.stages - 1:
            return source, output
        if self.stages > 1:
            kept[:] = [*kept[-1:], output.detach()]
        return source, self.loss(output, labels_BT)

    def _gradient(self, parameter: Tensor, watch: _Watch, engine: EngineMemory) -> None:
        assert parameter.grad is not None
        block = watch.blocks.get(parameter.grad.untyped_storage())
        if block is not None and block.column != "gradients":
            watch.memory.move(block, "gradients")
        engine.gradient(parameter)

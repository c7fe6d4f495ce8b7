"""Memory plan: what each rank of a run will hold, found by going through an optimizer step without data.

The stage of a rank is built from the real model code on fake tensors, which have shapes and lifetimes but
no elements, and runs forward and backward in the engine's order. What autograd keeps, what recompute drops
and what sequence parallelism splits is so never stated a second time. What DeepSpeed allocates around it
is: in the three engines at the end, read from its optimizers.

P parameters in this rank's memory, d data-parallel copies; all sizes in bytes.
"""

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_nexus.config.deepspeed_config import deepspeed_config
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.context import Context
from megatron_nexus.models.decoder import DecoderStage, Loss, stage_layers
from megatron_nexus.models.packing import Stream
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.models.rotary import rotary_tables
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box, Shard
from megatron_nexus.training.machine import DTYPES

FP32, BF16 = 4, 2
COLUMNS = ("weights", "gradients", "optimizer", "activations", "buffers")
START = "start"  # gone when training begins: counted in the peak alone
# DeepSpeed's defaults, where its configuration sets no other: elements.
REDUCE_BUCKET, ALL_REDUCE_BUCKET, MAX_LIVE, PERSISTENT = 500_000_000, 500_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class RankMemory:
    """What a rank holds: the most of each column, and the most of all at one moment, which is less."""

    columns: Mapping[str, int]
    peak: int


@dataclass
class Block:
    """Memory that is held until it is dropped."""

    size: int
    column: str


class Memory:
    """What is held now and was held at most."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.peak = 0

    def hold(self, column: str, size: int) -> Block:
        """Allocate `size` bytes under `column`."""
        block = Block(size, column)
        self._count(column, size)
        return block

    def drop(self, *blocks: Block) -> None:
        """Free blocks."""
        for block in blocks:
            self.held[block.column] -= block.size

    def move(self, block: Block, column: str) -> None:
        """Count a block under another column."""
        self.held[block.column] -= block.size
        block.column = column
        self._count(column, block.size)

    def _count(self, column: str, size: int) -> None:
        self.held[column] += size
        self.most[column] = max(self.most[column], self.held[column])
        self.peak = max(self.peak, self.held.total())


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

    all_gather_single = reduce_scatter_single = allreduce


class _Unfilled(Shard):
    """A shard of the same shapes whose parameters are left empty: no initial value is drawn."""

    def box(self, spec: ParamSpec) -> Box:
        none = (0,) * len(spec.axes)
        return Box(none, none)


def plan_memory(config: RunConfig, world_size: int, device: torch.device, multiple: int) -> list[RankMemory]:
    """The memory of the ranks of each pipeline stage; those that share a stage hold the same.

    `multiple` is the alignment of split axes, in elements.
    """
    stages = config.parallel.pipeline_model_parallel_size
    return [_plan_stage(config, world_size, device, multiple, stage, stages) for stage in range(stages)]


def _plan_stage(
    config: RunConfig, world_size: int, device: torch.device, multiple: int, stage: int, stages: int
) -> RankMemory:
    memory = Memory()
    rotary_tables.cache_clear()  # real tables would not be counted
    with FakeTensorMode(), device:
        step = _Step(config, device, multiple, stage, stages)
        engine = _engine_of(config)(memory, config, world_size, step.parameters, device)
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
        context = Context(
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

    def run(self, watch: _Watch, engine: "_Engine", micro_batches: int) -> None:
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

    def _gradient(self, parameter: Tensor, watch: _Watch, engine: "_Engine") -> None:
        assert parameter.grad is not None
        block = watch.blocks.get(parameter.grad.untyped_storage())
        if block is not None and block.column != "gradients":
            watch.memory.move(block, "gradients")
        engine.gradient(parameter)


class _Engine(ABC):
    """What DeepSpeed holds beside the model's own tensors, in the order in which it allocates it."""

    def __init__(
        self,
        memory: Memory,
        config: RunConfig,
        world_size: int,
        parameters: Sequence[tuple[ParamSpec, nn.Parameter]],
        device: torch.device,
    ) -> None:
        self.memory = memory
        self.copies = config.data_parallel_size(world_size)
        self.stage = max(1, config.parallel.zero_stage)
        self.width = DTYPES[config.training.precision].itemsize
        self.parameters = [parameter for _, parameter in parameters]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        groups = [[p.numel() for spec, p in parameters if spec.decays is decays] for decays in (True, False)]
        # Each group is padded so that its partitions are equal and aligned to two elements.
        unit = 2 * self.copies
        self.flat = [-(-sum(group) // unit) * unit for group in groups if group]
        zero = deepspeed_config(config, world_size)["zero_optimization"]
        assert isinstance(zero, dict)
        bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
        assert isinstance(bucket, int | float)
        self.bucket_elements = int(bucket)
        # A CPU has memory only where something was written.
        self.whole_bucket = device.type != "cpu"
        self.moments: list[Block] = []

    @property
    def elements(self) -> int:
        return sum(self.flat)

    def bucket(self, width: int) -> int:
        """Bytes of the buffer that gradients are gathered in."""
        elements = self.bucket_elements if self.whole_bucket else min(self.bucket_elements, self.elements)
        return width * elements

    def model(self, width: int) -> list[Block]:
        """The model as it is built, in fp32, and cast."""
        built = [self.memory.hold(START, FP32 * size) for size in self.sizes]
        if width == FP32:
            return built
        halves = []
        for block in built:
            halves.append(self.memory.hold(START, block.size // 2))
            self.memory.drop(block)
        return halves

    def make_moments(self, elements: Sequence[int]) -> None:
        """Adam's two, made in the first step."""
        if not self.moments:
            self.moments = [self.memory.hold("optimizer", FP32 * n) for n in elements for _ in range(2)]

    def passing(self, *sizes: int) -> None:
        """Buffers that come and go together."""
        self.memory.drop(*[self.memory.hold("buffers", size) for size in sizes])

    def gradient(self, parameter: Tensor) -> None:  # noqa: B027 - most engines leave it
        """The gradient of a parameter is complete."""

    def before_backward(self) -> None:  # noqa: B027 - most engines have no part in it
        """A backward pass begins."""

    @abstractmethod
    def start(self) -> None:
        """The engine is made."""

    @abstractmethod
    def after_backward(self, last: bool) -> None:
        """The backward pass of a micro-batch is over, of the step's last one where `last`."""

    @abstractmethod
    def step(self) -> None:
        """The optimizer steps."""


class _Bf16(_Engine):
    """BF16_Optimizer: bf16 weights, fp32 gradients of all of them, a share of the fp32 master weights."""

    def start(self) -> None:
        model = self.model(BF16)
        for flat in self.flat:
            self.memory.hold("weights", BF16 * flat)
        self.memory.drop(*model)
        for flat in self.flat:
            self.memory.hold("optimizer", FP32 * flat // self.copies)
            self.memory.hold("gradients", FP32 * flat)

    def after_backward(self, last: bool) -> None:
        # bf16 gradients stay allocated and are added to the fp32 ones, one by one (update_hp_grads).
        for size in self.sizes:
            self.passing(FP32 * size)
        if last:
            # All-reduced from one copy, cast to the type of communication (buffered_allreduce_fallback).
            elements = min(self.elements, ALL_REDUCE_BUCKET)
            copy = FP32 * elements if len(self.flat) > 1 else 0
            self.passing(copy, BF16 * elements)

    def step(self) -> None:
        self.make_moments([flat // self.copies for flat in self.flat])


class _Stage1And2(_Engine):
    """DeepSpeedZeroOptimizer: fp32 at stage 1, either precision at stage 2, without the pipeline engine."""

    def start(self) -> None:
        model = self.model(self.width)
        for flat in self.flat:
            self.memory.hold("weights", self.width * flat)
        self.memory.drop(*model)
        for flat in self.flat:
            self.memory.hold("optimizer", FP32 * flat // self.copies)
        self.passing(*[FP32 * flat // self.copies for flat in self.flat])
        self.gathered: Block | None = None
        self.kept: list[Block] = []

    @property
    def shares(self) -> list[int]:
        return [FP32 * flat // self.copies for flat in self.flat]

    def before_backward(self) -> None:
        if self.partitioned:
            self.gathered = self.memory.hold("gradients", self.bucket(self.width))

    @property
    def partitioned(self) -> bool:
        return self.stage == 2

    def gradient(self, parameter: Tensor) -> None:
        if self.partitioned:
            parameter.grad = None  # copied into the bucket

    def after_backward(self, last: bool) -> None:
        if self.partitioned:
            self.passing(self.bucket(self.width))  # the copy that is all-reduced
            if not self.kept:
                self.kept = [self.memory.hold("gradients", share) for share in self.shares]
            elif self.width == FP32:
                self.passing(*self.shares)  # the next micro-batch's, added to those kept
            assert self.gathered is not None
            self.memory.drop(self.gathered)
        elif last:
            self.passing(FP32 * min(self.elements, self.bucket_elements))

    def step(self) -> None:
        # Each group's gradients in one piece: the unpartitioned ones are dropped after that.
        copied = not (self.partitioned and self.width == BF16)
        flat = [self.memory.hold("buffers", share) for share in self.shares] if copied else []
        for parameter in self.parameters:
            parameter.grad = None
        self.memory.drop(*self.kept)
        self.kept = []
        self.make_moments([flat // self.copies for flat in self.flat])
        self.memory.drop(*flat)


class _Stage3(_Engine):
    """DeepSpeedZeroOptimizer_Stage3: every parameter is cut up, and whole while it is computed with."""

    def start(self) -> None:
        model = self.model(self.width)
        own = self.elements // self.copies
        parts = [self.memory.hold(START, self.width * size // self.copies) for size in self.sizes]
        self.memory.drop(*model)
        self.memory.hold("weights", self.width * own)
        self.memory.drop(*parts)
        if self.width != FP32:
            self.passing(FP32 * own)
            self.memory.hold("optimizer", FP32 * own)
        self.passing(FP32 * own)
        self.memory.hold("gradients", self.bucket(self.width))
        self.memory.hold("gradients", FP32 * own)
        small = sum(size for size in self.sizes if size < PERSISTENT)
        self.memory.hold("buffers", self.width * small)  # these stay whole
        self.large = min(self.elements, MAX_LIVE) - small
        self.whole: Block | None = None

    def before_backward(self) -> None:
        # Nothing is let go that is used again within stage3_max_reuse_distance: all of a small model.
        self.whole = self.memory.hold("buffers", self.width * self.large)

    def gradient(self, parameter: Tensor) -> None:
        parameter.grad = None  # copied into the bucket

    def after_backward(self, last: bool) -> None:
        # Reduce-scattered from one copy in the order of ranks (reduce_scatter_coalesced).
        self.passing(self.bucket(self.width), FP32 * self.elements // self.copies)
        assert self.whole is not None
        self.memory.drop(self.whole)

    def step(self) -> None:
        flat = self.memory.hold("buffers", FP32 * self.elements // self.copies)
        self.make_moments([self.elements // self.copies])
        self.memory.drop(flat)


def _engine_of(config: RunConfig) -> type[_Engine]:
    """The one that DeepSpeed chooses."""
    stage = max(1, config.parallel.zero_stage)
    if stage == 3:
        return _Stage3
    return _Bf16 if stage == 1 and config.training.precision == "bf16" else _Stage1And2

"""What DeepSpeed holds on a rank beside the model's own tensors, read from its optimizers.

One class for each optimizer that it chooses, and the account that they keep. All sizes in bytes.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_nexus.config.deepspeed_config import deepspeed_config
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.training.machine import DTYPES

FP32, BF16 = 4, 2
START = "start"  # gone when training begins: counted in the peak alone
# DeepSpeed's defaults, where its configuration sets no other: elements.
REDUCE_BUCKET, ALL_REDUCE_BUCKET, MAX_LIVE, PERSISTENT = 500_000_000, 500_000_000, 1_000_000_000, 100_000


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


class EngineMemory(ABC):
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
        settings = deepspeed_config(config, world_size, device.type)
        zero, bf16 = settings["zero_optimization"], settings["bf16"]
        assert isinstance(zero, dict) and isinstance(bf16, dict)
        # Bytes an element in which gradients are summed over ranks.
        self.summed = FP32 if settings["communication_data_type"] == "fp32" else BF16
        self.immediate = bf16.get("immediate_grad_update", False) is True
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

    def model(self) -> list[Block]:
        """The model as it is built."""
        return [self.memory.hold(START, self.width * size) for size in self.sizes]

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


class _Bf16(EngineMemory):
    """BF16_Optimizer: bf16 weights, fp32 gradients of all of them, a share of the fp32 master weights."""

    def start(self) -> None:
        model = self.model()
        for flat in self.flat:
            self.memory.hold("weights", BF16 * flat)
        self.memory.drop(*model)
        for flat in self.flat:
            self.memory.hold("optimizer", FP32 * flat // self.copies)
            self.memory.hold("gradients", FP32 * flat)

    def gradient(self, parameter: Tensor) -> None:
        if self.immediate:  # cast, added to the fp32 one and freed (accumulate_hp_grads_and_remove_lp)
            self.passing(FP32 * parameter.numel())
            parameter.grad = None

    def after_backward(self, last: bool) -> None:
        if not self.immediate:  # they stay allocated and are added one by one (update_hp_grads)
            for size in self.sizes:
                self.passing(FP32 * size)
        if last:
            # All-reduced from one copy, or in place where there is one tensor: alone, or as large as the
            # bucket; cast where that is asked for (allreduce_no_retain, allreduce_bucket).
            together = len(self.flat) > 1 and self.flat[0] <= ALL_REDUCE_BUCKET
            elements = self.elements if together else max(self.flat)
            self.passing(FP32 * elements * together, BF16 * elements * (self.summed == BF16))

    def step(self) -> None:
        self.make_moments([flat // self.copies for flat in self.flat])


class _Stage1And2(EngineMemory):
    """DeepSpeedZeroOptimizer: fp32 at stage 1, either precision at stage 2, without the pipeline engine."""

    def start(self) -> None:
        model = self.model()
        for flat in self.flat:
            self.memory.hold("weights", self.width * flat)
        self.memory.drop(*model)
        for flat in self.flat:
            self.memory.hold("optimizer", FP32 * flat // self.copies)
        self.passing(*self.shares)
        self.gathered: Block | None = None
        self.in_bucket = 0
        self.own: list[Block] = []
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
            if self.in_bucket + parameter.numel() > self.bucket_elements:
                self._reduce()
            self.in_bucket += parameter.numel()

    def _reduce(self) -> None:
        """All-reduce the bucket and keep what is this rank's own.

        This rank is the last: its share comes first, while most activations are there.
        """
        if self.width == FP32:
            self.own = self.own or [self.memory.hold("gradients", share) for share in self.shares]
        else:
            # A copy in fp32, of which this rank's is added to a buffer for all micro-batches.
            copy = self.memory.hold("buffers", FP32 * self.in_bucket * (self.summed == FP32))
            self.kept = self.kept or [self.memory.hold("gradients", share) for share in self.shares]
            self.memory.drop(copy)
        self.in_bucket = 0

    def after_backward(self, last: bool) -> None:
        if self.partitioned:
            self._reduce()
            if self.kept:
                self.memory.drop(*self.own)  # added to those of the micro-batches before
            else:
                self.kept = self.own
            self.own = []
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


class _Stage3(EngineMemory):
    """DeepSpeedZeroOptimizer_Stage3: every parameter is cut up, and whole while it is computed with."""

    @property
    def own(self) -> int:
        return sum(-(-size // self.copies) for size in self.sizes)

    def start(self) -> None:
        parts = []
        for size in self.sizes:  # each is divided as soon as it is built
            whole = self.memory.hold(START, self.width * size)
            parts.append(self.memory.hold(START, self.width * -(-size // self.copies)))
            self.memory.drop(whole)
        own = self.own
        self.memory.hold("weights", self.width * own)
        self.memory.drop(*parts)
        if self.width != FP32:
            self.passing(FP32 * own)
        self.memory.hold("optimizer", FP32 * own)  # of fp32 weights too: _create_fp32_partitions
        self.passing(FP32 * own)
        self.memory.hold("gradients", self.bucket(self.summed))
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
        self.passing(self.bucket(self.summed), FP32 * self.own * (self.summed == BF16))
        assert self.whole is not None
        self.memory.drop(self.whole)

    def step(self) -> None:
        flat = self.memory.hold("buffers", FP32 * self.own)
        self.make_moments([self.own])
        self.memory.drop(flat)


def engine_memory_of(config: RunConfig) -> type[EngineMemory]:
    """The one that DeepSpeed chooses."""
    stage = max(1, config.parallel.zero_stage)
    if stage == 3:
        return _Stage3
    return _Bf16 if stage == 1 and config.training.precision == "bf16" else _Stage1And2

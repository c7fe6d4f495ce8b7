"""What DeepSpeed holds on a rank besides the model's own tensors, read from its optimizers.

One class for each optimizer that it chooses, and the account that they keep. All sizes in bytes.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_nexus.config.deepspeed_config import bucket_elements, deepspeed_config, engine_reduces_gradients
from megatron_nexus.config.optimizer_groups import bucket_ranges
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.layer_context import DTYPES

FP32, BF16 = 4, 2
START = "start"  # gone when training begins: counted in the peak alone
# DeepSpeed's defaults, where its configuration sets no other: elements.
REDUCE_BUCKET, ALL_REDUCE_BUCKET, MAX_LIVE, PERSISTENT = 500_000_000, 500_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class Allocation:
    """Memory that is held until it is dropped."""

    size: int
    column: str


class Memory:
    """Bytes allocated now, and the peak."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.total = self.peak = 0

    def hold(self, column: str, size: int) -> Allocation:
        """Allocate `size` bytes under `column`."""
        self.swing(column, size, size)
        return Allocation(size, column)

    def drop(self, *allocations: Allocation) -> None:
        """Free allocations."""
        for allocation in allocations:
            self.swing(allocation.column, 0, -allocation.size)

    def swing(self, column: str, most: int, level: int) -> None:
        """Hold up to `most` bytes more under `column` for a moment, and then `level` more."""
        held = self.held[column]
        self.most[column] = max(self.most[column], held + most)
        self.peak = max(self.peak, self.total + most)
        self.held[column] = held + level
        self.total += level


@dataclass(frozen=True)
class ParameterSize:
    """A parameter's elements on this rank, and whether weight decay applies: that chooses its group."""

    elements: int
    decays: bool


class EngineMemory(ABC):
    """What DeepSpeed holds besides the model's own tensors, in the order in which it allocates it."""

    takes_gradients = False
    """Whether each gradient leaves `.grad` as soon as it is complete."""

    def __init__(
        self,
        memory: Memory,
        config: RunConfig,
        world_size: int,
        parameters: Sequence[ParameterSize],
        device_type: str,
    ) -> None:
        self.memory = memory
        self.copies = config.data_parallel_size(world_size)
        self.stage = max(1, config.parallel.zero_stage)
        self.width = DTYPES[config.training.precision].itemsize
        self.sizes = [parameter.elements for parameter in parameters]
        settings = deepspeed_config(config, world_size, device_type)
        # Whether gradients are reduce-scattered by GradientReducer; from where each bucket arrives in a copy.
        self.scattered = engine_reduces_gradients(settings)
        self.received = FP32 * (device_type == "cpu")
        least = bucket_elements(config, world_size, settings)
        # The numbers of the parameters of each parameter group.
        self.groups: list[list[int]] = []
        for decays in (True, False):
            members = [index for index, parameter in enumerate(parameters) if parameter.decays is decays]
            for places in bucket_ranges([self.sizes[index] for index in members], least):
                self.groups.append([members[place] for place in places])
        # Each group is padded so that its partitions are equal and aligned to two elements.
        unit = 2 * self.copies
        self.flat = [-(-sum(self.sizes[index] for index in group) // unit) * unit for group in self.groups]
        zero, bf16 = settings["zero_optimization"], settings["bf16"]
        assert isinstance(zero, dict) and isinstance(bf16, dict)
        # Bytes an element in which gradients are summed over ranks.
        self.summed = FP32 if settings["communication_data_type"] == "fp32" else BF16
        self.immediate = bf16.get("immediate_grad_update", False) is True
        bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET)
        assert isinstance(bucket, int | float)
        self.bucket_elements = int(bucket)
        # A CPU has memory only where something was written.
        self.whole_bucket = device_type != "cpu"
        self.grads: dict[int, Allocation] = {}
        self.has_moments = False

    @property
    def elements(self) -> int:
        """Number of elements of all parameters, padding included."""
        return sum(self.flat)

    def bucket(self, width: int) -> int:
        """Return bytes of the buffer that gradients are gathered in."""
        elements = self.bucket_elements if self.whole_bucket else min(self.bucket_elements, self.elements)
        return width * elements

    def model(self) -> list[Allocation]:
        """Allocate the model as it is built."""
        return [self.memory.hold(START, self.width * size) for size in self.sizes]

    def make_moments(self, elements: Sequence[int]) -> None:
        """Allocate Adam's two moments, in the first step."""
        if not self.has_moments:
            self.memory.hold("optimizer", 2 * FP32 * sum(elements))
            self.has_moments = True

    def transient(self, *sizes: int) -> None:
        """Allocate buffers that come and go together."""
        self.memory.swing("buffers", sum(sizes), 0)

    def gradient(self, index: int, transient: bool = True) -> None:
        """Account for the complete gradient of a parameter.

        One that the engine takes at once is counted as long as that lasts, unless not `transient`.
        """
        size = self.width * self.sizes[index]
        if self.takes_gradients:
            self.take(index, size * transient)
        elif index not in self.grads:  # else it is added to the one of the micro-batches before
            self.grads[index] = self.memory.hold("gradients", size)

    def take(self, index: int, size: int) -> None:
        """Take a gradient of `size` bytes away: most engines copy it into a buffer that is there."""
        self.memory.swing("gradients", size, 0)

    def before_backward(self) -> None:  # noqa: B027 - most engines have no part in it
        """Begin a backward pass."""

    @abstractmethod
    def start(self) -> None:
        """Make the engine."""

    @abstractmethod
    def after_backward(self, last: bool) -> None:
        """End the backward pass of a micro-batch, of the step's last one where `last`."""

    @abstractmethod
    def step(self) -> None:
        """Step the optimizer."""


class _Bf16(EngineMemory):
    """BF16_Optimizer: bf16 weights, fp32 gradients of all of them, a share of the fp32 master weights."""

    def start(self) -> None:
        self.takes_gradients = self.immediate
        model = self.model()
        self.memory.hold("weights", BF16 * self.elements)
        self.memory.drop(*model)
        for flat in self.flat:
            self.memory.hold("optimizer", FP32 * flat // self.copies)
            self.memory.hold("gradients", FP32 * flat)

    def take(self, index: int, size: int) -> None:
        if self.scattered:  # GradientSums
            super().take(index, size)
            return
        # Cast, added to the fp32 one and freed (accumulate_hp_grads_and_remove_lp).
        grad = self.memory.hold("gradients", size)
        self.transient(FP32 * self.sizes[index])
        self.memory.drop(grad)

    def after_backward(self, last: bool) -> None:
        # They stay allocated and are added one by one (update_hp_grads).
        if not self.immediate and not self.scattered:
            self.transient(FP32 * max(self.sizes))
        if last and self.scattered:
            self.transient(self.received * self.elements * (self.copies > 1))
        elif last:
            # All-reduced from one copy, or in place where there is one tensor: alone, or as large as the
            # bucket; cast where that is asked for (allreduce_no_retain, allreduce_bucket).
            together = len(self.flat) > 1 and self.flat[0] <= ALL_REDUCE_BUCKET
            elements = self.elements if together else max(self.flat)
            self.transient(FP32 * elements * together, BF16 * elements * (self.summed == BF16))

    def step(self) -> None:
        self.make_moments([flat // self.copies for flat in self.flat])


class _Stage1And2(EngineMemory):
    """DeepSpeedZeroOptimizer: fp32 at stage 1, either precision at stage 2, without the pipeline engine."""

    def start(self) -> None:
        self.takes_gradients = self.stage == 2
        model = self.model()
        self.memory.hold("weights", self.width * self.elements)
        self.memory.drop(*model)
        self.share = FP32 * self.elements // self.copies
        self.memory.hold("optimizer", self.share)
        self.transient(self.share)
        self.in_bucket = 0
        self.gathered: Allocation | None = None
        self.own: Allocation | None = None
        self.kept: Allocation | None = None

    def before_backward(self) -> None:
        if self.takes_gradients:
            self.gathered = self.memory.hold("gradients", self.bucket(self.width))

    def take(self, index: int, size: int) -> None:
        super().take(index, size)
        if self.in_bucket + self.sizes[index] > self.bucket_elements:
            self._reduce()
        self.in_bucket += self.sizes[index]

    def _reduce(self) -> None:
        """All-reduce the bucket and keep what is this rank's own.

        This rank is the last: its share comes first, while most activations are there.
        """
        if self.width == FP32:
            self.own = self.own or self.memory.hold("gradients", self.share)
        else:
            # A copy in fp32, of which this rank's is added to a buffer for all micro-batches.
            copy = self.memory.hold("buffers", FP32 * self.in_bucket * (self.summed == FP32))
            self.kept = self.kept or self.memory.hold("gradients", self.share)
            self.memory.drop(copy)
        self.in_bucket = 0

    def after_backward(self, last: bool) -> None:
        if self.takes_gradients:
            self._reduce()
            if self.kept and self.own:
                self.memory.drop(self.own)  # added to those of the micro-batches before
            elif self.own:
                self.kept = self.own
            self.own = None
            assert self.gathered is not None
            self.memory.drop(self.gathered)
        elif last and self.scattered:
            self._reduce_scatter() if self.copies > 1 else self._put_together()
        elif last:
            self.transient(FP32 * min(self.elements, self.bucket_elements))

    def _reduce_scatter(self) -> None:
        """Copy the gradients of each bucket into one tensor and receive this rank's partition of it."""
        self.kept = self.memory.hold("gradients", self.share)
        sent = []
        for group, flat in zip(self.groups, self.flat, strict=True):
            sent.append(self.memory.hold("buffers", FP32 * flat))
            self.memory.drop(*(self.grads.pop(index) for index in group if index in self.grads))
            sent.append(self.memory.hold("buffers", self.received * flat))
        self.memory.drop(*sent)

    def _put_together(self) -> None:
        """Copy the gradients of each bucket into one tensor, which is where the optimizer reads them."""
        for group, flat in zip(self.groups, self.flat, strict=True):
            self.memory.hold("gradients", FP32 * flat)
            self.memory.drop(*(self.grads.pop(index) for index in group if index in self.grads))
        self.kept = Allocation(FP32 * self.elements, "gradients")

    def step(self) -> None:
        # Each group's gradients in one piece: the unpartitioned ones are dropped after that.
        copied = not (self.takes_gradients and self.width == BF16) and (self.grads or not self.scattered)
        flat = self.memory.hold("buffers", self.share * bool(copied))
        self.memory.drop(*self.grads.values(), *([self.kept] if self.kept else []))
        self.grads.clear()
        self.kept = None
        self.make_moments([flat // self.copies for flat in self.flat])
        self.memory.drop(flat)


class _Stage3(EngineMemory):
    """DeepSpeedZeroOptimizer_Stage3: every parameter is cut up, and whole while it is computed with."""

    takes_gradients = True

    def start(self) -> None:
        parts = []
        for size in self.sizes:  # each is divided as soon as it is built
            whole = self.memory.hold(START, self.width * size)
            parts.append(self.memory.hold(START, self.width * -(-size // self.copies)))
            self.memory.drop(whole)
        self.own = own = sum(-(-size // self.copies) for size in self.sizes)
        self.memory.hold("weights", self.width * own)
        self.memory.drop(*parts)
        if self.width != FP32:
            self.transient(FP32 * own)
        self.memory.hold("optimizer", FP32 * own)  # of fp32 weights too: _create_fp32_partitions
        self.transient(FP32 * own)
        self.memory.hold("gradients", self.bucket(self.summed))
        self.memory.hold("gradients", FP32 * own)
        small = sum(size for size in self.sizes if size < PERSISTENT)
        self.memory.hold("buffers", self.width * small)  # these stay whole
        self.large = min(self.elements, MAX_LIVE) - small

    def before_backward(self) -> None:
        # Nothing is let go that is used again within stage3_max_reuse_distance: all of a small model.
        self.whole = self.memory.hold("buffers", self.width * self.large)

    def after_backward(self, last: bool) -> None:
        # Reduce-scattered from one copy in the order of ranks (reduce_scatter_coalesced).
        self.transient(self.bucket(self.summed), FP32 * self.own * (self.summed == BF16))
        self.memory.drop(self.whole)

    def step(self) -> None:
        flat = self.memory.hold("buffers", FP32 * self.own)
        self.make_moments([self.own])
        self.memory.drop(flat)


def engine_memory_of(config: RunConfig) -> type[EngineMemory]:
    """Return the class of the optimizer that DeepSpeed chooses."""
    stage = max(1, config.parallel.zero_stage)
    if stage == 3:
        return _Stage3
    return _Bf16 if stage == 1 and config.training.precision == "bf16" else _Stage1And2

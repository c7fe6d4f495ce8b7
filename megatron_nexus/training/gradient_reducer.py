"""Gradients of ZeRO 1, reduce-scattered in fp32 while the last micro-batch's backward pass runs.

DeepSpeed all-reduces them after that pass. Here each parameter group of the optimizer is a bucket
(`training/optimizer.py`): as soon as its last gradient is complete it is reduced, and each rank receives
its own partition alone, 4 (d - 1) / d bytes a parameter: half of an all-reduce. From there on all is
DeepSpeed's: norm, clipping, Adam, the all-gather of the weights. Sealed for `deepspeed`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor, nn

from megatron_nexus.config.optimizer_groups import DECAY, NO_DECAY
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.data_parallel import MeanReduction
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.gradient_sums import GradientSums
from megatron_nexus.training.zero_state import DeepSpeedEngine


class GradientReducer(ABC):
    """Reduces the buckets of one engine, in the order in which the backward pass completes them."""

    def __init__(self, engine: DeepSpeedEngine, mesh: Mesh, overlap: bool, beacon: Beacon) -> None:
        """Take the reduction over from DeepSpeed; after the backward pass, unless `overlap`.

        `beacon` shows when this rank waits for it.
        """
        self._engine, self._beacon = engine, beacon
        self._zero: ZeROOptimizer = engine.optimizer
        self._mesh = mesh
        self._buckets: list[list[nn.Parameter]] = self._groups()
        self._bucket_of = {p: index for index, bucket in enumerate(self._buckets) for p in bucket}
        # A backward pass completes gradients from the last parameter to the first. All ranks begin their
        # reductions in this order, whatever is complete first.
        place = {parameter: index for index, parameter in enumerate(engine.module.parameters())}
        self._order = sorted(
            range(len(self._buckets)),
            key=lambda index: min(place[p] for p in self._buckets[index]),
            reverse=True,
        )
        self._restart()
        self._install()
        if overlap and self._complete_in_backward:
            for parameter in self._bucket_of:
                parameter.register_post_accumulate_grad_hook(self._count)

    @property
    def _complete_in_backward(self) -> bool:
        """Whether gradients are where they are reduced from as soon as a hook of the parameter runs."""
        return True

    @abstractmethod
    def _groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each parameter group of the optimizer."""

    @abstractmethod
    def _install(self) -> None:
        """Have DeepSpeed call `finish` in place of its own reduction."""

    @abstractmethod
    def _begin(self, index: int) -> MeanReduction:
        """Begin to reduce a bucket."""

    def _begin_next(self) -> None:
        """Begin to reduce the next bucket, after the second stage of the one before."""
        if self._begun:
            self._begun[-1].advance()
        self._begun.append(self._begin(self._waiting[0]))

    def _restart(self) -> None:
        self._passes: Counter[nn.Parameter] = Counter()
        self._incomplete = [len(bucket) for bucket in self._buckets]
        self._begun: list[MeanReduction] = []

    def _count(self, parameter: nn.Parameter) -> None:
        """Count a backward pass of a parameter; begin to reduce the buckets that it completes, in order."""
        self._passes[parameter] += 1
        if self._passes[parameter] == self._engine.gradient_accumulation_steps():
            self._incomplete[self._bucket_of[parameter]] -= 1
            while self._waiting and not self._incomplete[self._waiting[0]]:
                self._begin_next()

    @property
    def _waiting(self) -> list[int]:
        """The buckets that are not yet being reduced."""
        return self._order[len(self._begun) :]

    @torch.no_grad()
    def finish(self) -> None:
        """Reduce what has not been, and wait for all of it; the last backward pass is over."""
        self._beacon.mark(Phase.REDUCTION)
        while self._waiting:
            self._begin_next()
        for reduction in self._begun:
            reduction.finish()
        self._restart()


class _NormOverAllRanks:
    """DeepSpeed's mpu, but for the ranks over which it sums the squares of the norm."""

    def __init__(self, mpu: object) -> None:
        self._mpu = mpu

    def get_model_parallel_group(self) -> None:
        """All of them: the default group."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._mpu, name)


class _Bf16Reducer(GradientReducer):
    """BF16_Optimizer: the fp32 gradients of a group lie in one buffer, in which they are reduced."""

    def _groups(self) -> list[list[nn.Parameter]]:
        return list(self._zero.bf16_groups)

    def _install(self) -> None:
        self._sums = GradientSums(self._zero)
        _replace_reduction(self._engine, self.finish)
        # A rank has the sums of its own partition alone.
        self._zero.get_grads_for_norm = self._own_gradients
        self._zero.mpu = _NormOverAllRanks(self._zero.mpu)

    @property
    def _complete_in_backward(self) -> bool:
        # Else each is added to the buffer after the backward pass.
        return bool(self._zero.immediate_grad_update)

    def _begin(self, index: int) -> MeanReduction:
        self._sums.complete([index])
        flat = self._zero.fp32_groups_gradients_flat[index]
        partition = self._zero.fp32_groups_gradient_flat_partition[index]
        return MeanReduction(flat, partition, self._mesh.reduction_groups)

    def _own_gradients(
        self, for_clipping: bool = False
    ) -> list[Tensor] | tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Return what this rank clips, or what its share of the norm is of: each element on one rank."""
        partitions: list[Tensor] = self._zero.fp32_groups_gradient_flat_partition
        if for_clipping:
            return partitions
        counted = [part for index in range(len(partitions)) for part in self._counted(index)]
        return counted or [partitions[0].new_zeros(1)], {}

    def _counted(self, index: int) -> Iterator[Tensor]:
        """Yield the part in this rank's partition of each parameter that counts on this rank."""
        partition = self._zero.fp32_groups_gradient_flat_partition[index]
        start = -self._mesh.dp_rank * partition.numel()
        for parameter in self._buckets[index]:
            low, high = max(start, 0), min(start + parameter.numel(), partition.numel())
            if low < high and (self._mesh.tp_rank == 0 or is_model_parallel_parameter(parameter)):
                yield partition[low:high]
            start += parameter.numel()


class _Fp32Reducer(GradientReducer):
    """DeepSpeedZeroOptimizer: each gradient is a tensor of its own, copied into its bucket."""

    def _groups(self) -> list[list[nn.Parameter]]:
        return list(self._zero.bit16_groups)

    def _install(self) -> None:
        self._zero.reduce_gradients = lambda pipeline_parallel: self.finish()
        self._zero.scaled_global_norm = self._norm
        self._zero.unscale_and_clip_grads = self._clip

    def _begin(self, index: int) -> MeanReduction:
        own = self._zero._build_compact_grad_partition_buffer(index)
        flat = own.flat_partition.new_empty(self._zero.bit16_groups_flat[index].numel())
        self._gather(index, flat)
        self._zero.averaged_gradients[index] = own
        return MeanReduction(flat, own.flat_partition, self._mesh.reduction_groups)

    def _gather(self, index: int, flat: Tensor) -> None:
        """Move the gradients of a bucket into `flat`."""
        start = 0
        for parameter in self._buckets[index]:
            into = flat[start : start + parameter.numel()].view_as(parameter)
            if parameter.grad is None:
                into.zero_()
            else:
                into.copy_(parameter.grad)
            parameter.grad = None
            start += parameter.numel()
        flat[start:].zero_()

    def _norm(self) -> Tensor:
        """Return the norm of all gradients, not finite where they are not.

        DeepSpeed sums the squares of each parameter group over the ranks, of which pipeline stages may have
        different numbers; here those of the matrices and those of all others are summed at once.
        """
        squares: dict[str, list[Tensor]] = {DECAY: [], NO_DECAY: []}
        for index, group in enumerate(self._zero.optimizer.param_groups):
            parts = self._zero.averaged_gradients[index]  # and padding behind the parameters
            held = [part for part in parts if not getattr(part, "_zero_padding", False)]
            for part, parameter in zip(held, self._zero.params_in_partition[index], strict=True):
                if self._mesh.tp_rank == 0 or is_model_parallel_parameter(parameter):
                    squares[group["name"]].append(torch.linalg.vector_norm(part))
        zero = torch.zeros(1, device=self._mesh.device)
        sums = torch.stack(
            [torch.stack(norms).pow(2).sum() if norms else zero[0] for norms in squares.values()]
        )
        dist.all_reduce(sums, group=self._mesh.dp_group)
        self._zero._model_parallel_all_reduce(tensor=sums, op=dist.ReduceOp.SUM)
        return torch.linalg.vector_norm(sums.sqrt())

    def _clip(self, gradients: list[Tensor], norm: Tensor) -> None:
        """Clip a bucket as DeepSpeed does, which reads the norm from the device once more for each."""
        largest = self._zero.clip_grad
        if largest > 0.0:
            factor = 1.0 / ((norm + 1e-6) / largest).clamp(min=1.0)
            for gradient in gradients:
                gradient.mul_(factor)

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        self._zero._release_ipg_buffers()


class _Fp32Alone(_Fp32Reducer):
    """One data-parallel rank: each gradient is copied into its bucket; norm and clipping are DeepSpeed's."""

    def _install(self) -> None:
        self._zero.reduce_gradients = lambda pipeline_parallel: self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the gradients of each bucket together."""
        for index in range(len(self._buckets)):
            own = self._zero._build_compact_grad_partition_buffer(index)
            self._gather(index, own.flat_partition)
            self._zero.averaged_gradients[index] = own
        self._zero._release_ipg_buffers()


def reduce_gradients(engine: DeepSpeedEngine, mesh: Mesh, overlap: bool, beacon: Beacon) -> None:
    """Have the gradients of an engine at ZeRO 1 reduced here, not by DeepSpeed."""
    is_bf16 = isinstance(engine.optimizer, BF16_Optimizer)
    if mesh.dp_size > 1:
        (_Bf16Reducer if is_bf16 else _Fp32Reducer)(engine, mesh, overlap, beacon)
    elif is_bf16:
        # DeepSpeed would copy them all, all-reduce the copy over one rank, and copy it back.
        _replace_reduction(engine, GradientSums(engine.optimizer).complete)
    else:
        # The same, and flatten them once more.
        _Fp32Alone(engine, mesh, overlap=False, beacon=beacon)


def _replace_reduction(engine: DeepSpeedEngine, reduce: Callable[[], None]) -> None:
    """Have BF16_Optimizer's engine call `reduce` in place of its own reduction."""
    assert hasattr(engine, "buffered_allreduce_fallback"), "this DeepSpeed has another name for it"
    engine.buffered_allreduce_fallback = lambda grads, elements_per_buffer: reduce()

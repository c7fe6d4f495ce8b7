"""Float64 engine: has DeepSpeed keep weights, gradients and moments in float64. Sealed for `deepspeed`.

DeepSpeed takes a model's type from its fp16 and bf16 switches, else it is float32. `nexus compare` wants no
rounding: in float64 two topologies differ by 1e-13 of a tensor's largest element, so that what differs by
more is a fault.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megatron_nexus.parallel.mesh import Mesh


@contextlib.contextmanager
def float64_engine() -> Iterator[None]:
    """Have the engine that is made in this block compute in float64, as its model's parameters are."""
    data_types, master_type = DeepSpeedEngine.get_data_types, ZeROOptimizer._configure_master_weights

    def float64_master(optimizer: ZeROOptimizer, **settings: object) -> torch.dtype:
        master_type(optimizer, **settings)  # which keeps the settings
        return torch.float64

    DeepSpeedEngine.get_data_types = lambda engine: (torch.float64, torch.float64)
    ZeROOptimizer._configure_master_weights = float64_master
    try:
        yield
    finally:
        DeepSpeedEngine.get_data_types = data_types
        ZeROOptimizer._configure_master_weights = master_type


def reduce_in_float64(engine: DeepSpeedEngine, mesh: Mesh) -> None:
    """Have gradients, their norm and the loss be summed in float64; no setting of DeepSpeed asks for it."""
    optimizer: ZeROOptimizer = engine.optimizer
    buckets = optimizer.ipg_buckets
    bucket = buckets[torch.float64] = buckets.pop(optimizer.communication_data_type)
    if isinstance(bucket.buffer, torch.Tensor):
        bucket.buffer = torch.empty_like(bucket.buffer, dtype=torch.float64)
    optimizer.communication_data_type = torch.float64
    if isinstance(optimizer, DeepSpeedZeroOptimizer):  # that of ZeRO 3 is in float64
        optimizer.get_grad_norm_direct = partial(_norm, optimizer)
    if mesh.pp_size > 1:
        engine._aggregate_total_loss = partial(_pipeline_loss, engine, mesh)


def _norm(
    optimizer: DeepSpeedZeroOptimizer,
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    order: int = 2,
) -> Tensor:
    """Return the norm of the gradients of all ranks, by DeepSpeed's rule of which rank counts which."""
    kept = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    norms = [
        gradient.double().norm(order)
        for gradient, parameter in zip(kept, params, strict=False)
        if is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0
    ]
    total = torch.stack(norms).pow(order).sum() if norms else gradients[0].new_zeros(()).double()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
    return total.pow(1.0 / order)


def _pipeline_loss(engine: PipelineEngine, mesh: Mesh) -> Tensor:
    """Return the mean loss of all samples on every stage."""
    loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if mesh.is_last_stage:
        loss += engine._scale_loss_by_gas(engine.total_loss)
        dist.all_reduce(loss, group=mesh.dp_group)
    dist.all_reduce(loss, group=mesh.pp_group)
    engine.dp_group_loss = loss = loss / mesh.dp_size
    return loss

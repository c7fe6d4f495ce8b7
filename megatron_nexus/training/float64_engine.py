"""Float64 engine: has DeepSpeed keep weights, gradients and moments in float64. Sealed for `deepspeed`.

DeepSpeed takes a model's type from its fp16 and bf16 switches, else it is float32. `nexus compare` wants no
rounding: in float64 two topologies differ by 1e-13 of a tensor's largest element, so that what differs by
more is a fault.
"""

import contextlib
from collections.abc import Iterator

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine


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


def reduce_in_float64(optimizer: ZeROOptimizer) -> None:
    """Have gradients be summed over ranks in float64; DeepSpeed's configuration cannot ask for it."""
    buckets = optimizer.ipg_buckets
    bucket = buckets[torch.float64] = buckets.pop(optimizer.communication_data_type)
    if isinstance(bucket.buffer, torch.Tensor):
        bucket.buffer = torch.empty_like(bucket.buffer, dtype=torch.float64)
    optimizer.communication_data_type = torch.float64

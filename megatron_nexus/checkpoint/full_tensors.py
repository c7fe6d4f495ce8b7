"""Read whole logical tensors of a checkpoint into the memory of one process."""

import torch
from torch import Tensor

from megatron_nexus.checkpoint.chunks import full_box, split_box
from megatron_nexus.checkpoint.store import StateReader

READ_ELEMENTS = 1 << 22
"""Elements read at a time, as float32, in addition to the tensor that they go to."""


@torch.no_grad()
def read_full_tensor(reader: StateReader, name: str, values: Tensor) -> None:
    """Fill `values`, of the logical shape and any type, with the weights `name`. Raises CheckpointError."""
    for box in split_box(full_box(tuple(values.shape)), READ_ELEMENTS):
        values[box.index] = torch.from_numpy(reader.read_box(name, "fp32", box)).to(values.dtype)

"""Collectives of short texts between all ranks of a mesh, on the host.

They go over the mesh's control group as plain bytes: nothing is pickled.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.parallel.mesh import Mesh


def all_gather_str(mesh: Mesh, message: str) -> list[str]:
    """Return the short message of every rank on every rank; a collective call."""
    contents = _bytes_of(message)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.world_size)]
    dist.all_gather(lengths, torch.tensor([contents.numel()]), group=mesh.control)
    longest = max(int(length) for length in lengths)
    if longest == 0:
        return [""] * mesh.world_size
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: contents.numel()] = contents
    gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(mesh.world_size)]
    dist.all_gather(gathered, padded, group=mesh.control)
    return [_text_of(part[: int(length)]) for part, length in zip(gathered, lengths, strict=True)]


def gather_str(mesh: Mesh, message: str) -> list[str]:
    """Return the message of every rank on rank 0, and an empty list elsewhere; a collective call."""
    contents = _bytes_of(message)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(mesh.world_size)]
    dist.all_gather(lengths, torch.tensor([contents.numel()]), group=mesh.control)
    padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
    padded[: contents.numel()] = contents
    if mesh.rank != 0:
        dist.gather(padded, dst=0, group=mesh.control)
        return []
    gathered = [torch.empty_like(padded) for _ in range(mesh.world_size)]
    dist.gather(padded, gathered, dst=0, group=mesh.control)
    return [_text_of(part[: int(length)]) for part, length in zip(gathered, lengths, strict=True)]


def _text_of(contents: Tensor) -> str:
    return contents.numpy().tobytes().decode()


def _bytes_of(message: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(message.encode(), np.uint8).copy())


def broadcast_str(mesh: Mesh, message: str, source: int) -> str:
    """Return the message of the rank `source` on every rank; a collective call."""
    contents = _bytes_of(message)
    length = torch.tensor([contents.numel()])
    dist.broadcast(length, source, group=mesh.control)
    if mesh.rank != source:
        contents = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(contents, source, group=mesh.control)
    return _text_of(contents)


def gather_from_stages(mesh: Mesh, message: str) -> list[str]:
    """Return the messages of the first rank of each pipeline stage on every rank; a collective call."""
    per_stage = mesh.dp_size * mesh.tp_size
    return [broadcast_str(mesh, message, pipe * per_stage) for pipe in range(mesh.pp_size)]


@dataclass(frozen=True)
class MeshRanks:
    """The ranks of a mesh as those of a communicator."""

    mesh: Mesh

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return self.mesh.rank

    @property
    def size(self) -> int:
        """How many there are."""
        return self.mesh.world_size

    def all_gather_str(self, message: str) -> list[str]:
        """Return the short message of every rank on every rank; a collective call."""
        return all_gather_str(self.mesh, message)

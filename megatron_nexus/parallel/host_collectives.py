"""Agreement of all ranks: a barrier that carries what went wrong, so that no rank waits for one that failed.

Messages go over the mesh's control group as plain bytes: nothing is pickled.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.errors import CheckpointError
from megatron_nexus.parallel.mesh import Mesh


def all_gather_str(mesh: Mesh, message: str) -> list[str]:
    """The short message of every rank, on every rank; a collective call."""
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
    return [
        part[: int(length)].numpy().tobytes().decode() for part, length in zip(gathered, lengths, strict=True)
    ]


def _bytes_of(message: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(message.encode(), np.uint8).copy())


def broadcast_str(mesh: Mesh, message: str, source: int) -> str:
    """The message of the rank `source`, on every rank; a collective call."""
    contents = _bytes_of(message)
    length = torch.tensor([contents.numel()])
    dist.broadcast(length, source, group=mesh.control)
    if mesh.rank != source:
        contents = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(contents, source, group=mesh.control)
    return contents.numpy().tobytes().decode()


def gather_from_stages(mesh: Mesh, message: str) -> list[str]:
    """The messages of the first rank of each pipeline stage; a collective call."""
    per_stage = mesh.dp_size * mesh.tp_size
    return [broadcast_str(mesh, message, pipe * per_stage) for pipe in range(mesh.pp_size)]


@contextmanager
def raise_on_all_ranks(mesh: Mesh, purpose: str, remedy: str = "") -> Iterator[None]:
    """Run a block on every rank: all ranks leave it as from a barrier, or all raise.

    Raises:
        CheckpointError: on some rank the block raised OSError or CheckpointError.
    """
    problem = ""
    try:
        yield
    except (OSError, CheckpointError) as error:
        problem = str(error)
    problems = all_gather_str(mesh, problem)
    if any(problems):
        ranks_of: dict[str, list[int]] = {}
        for rank, text in enumerate(problems):
            if text:
                ranks_of.setdefault(text, []).append(rank)
        lines = [f"  rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items()]
        raise CheckpointError("\n".join([purpose, *lines, *([f"  {remedy}"] if remedy else [])]))

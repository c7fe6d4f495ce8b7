"""Errors of torch that a run explains: memory that runs out, and a library of torch.compile that is damaged.

The compiler writes libraries under their final names. A run that is killed meanwhile, or a disk that is full,
leaves a part of one, which every later run loads.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import TrainingError
from megatron_nexus.parallel.beacon import Beacon
from megatron_nexus.training.profiler import snapshot_path

_OF_HOST = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
"""How torch and C libraries say on a CPU that memory runs out."""
_DAMAGED = re.compile(r"(\S+\.so): (file too short|invalid ELF header|.*cannot read file data.*|ELF .*)")
"""How the loader of libraries says that one is damaged."""


@contextmanager
def explaining_memory_errors(
    config: RunConfig, rank: int, dp_size: int, device: torch.device, beacon: Beacon
) -> Iterator[None]:
    """Raise TrainingError, which says what to do, where memory runs out in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_device = isinstance(error, torch.OutOfMemoryError)
        of_host = isinstance(error, MemoryError) or any(words in str(error) for words in _OF_HOST)
        if not on_device and not of_host:
            raise
        said = (str(error).splitlines() or ["no more memory"])[0]
        where = f"rank {rank} on {socket.gethostname()}, {beacon.read()[0]}"
        held = _held(device) if on_device else ""
        dumped = _dump(config, rank) if on_device else ""
        wanted = "; ".join(remedies(config, dp_size))
        raise TrainingError(
            f"out of memory: {where}: {said}{held}{dumped}. What needs less: {wanted}. --dry-run plans the "
            "memory of each rank"
        ) from error


def remedies(config: RunConfig, dp_size: int) -> Iterator[str]:
    """Yield the flags that make a run need less memory, the cheapest first."""
    training, parallel = config.training, config.parallel
    if training.micro_batch_size > 1:
        yield f"--micro-batch-size {training.micro_batch_size // 2} (it is {training.micro_batch_size})"
    if training.recompute_granularity != "full":
        stronger = "full" if training.recompute_granularity == "selective" else "selective, or full"
        yield f"--recompute-granularity {stronger}"
    if parallel.pipeline_model_parallel_size == 1 and dp_size > 1 and parallel.zero_stage < 3:
        yield f"--zero-stage {max(2, parallel.zero_stage + 1)}"
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield "--sequence-parallel"
    yield f"a larger --tp (it is {parallel.tensor_model_parallel_size}) or more ranks"


def _held(device: torch.device) -> str:
    """Return what the device's memory is held by. Not run on a GPU yet."""
    free, total = torch.cuda.mem_get_info(device)
    tensors, cached = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    others = max(0, total - free - cached)
    return (
        f"; of {total / 2**30:.1f} GiB tensors hold {tensors / 2**30:.1f}, the allocator's cache "
        f"{(cached - tensors) / 2**30:.1f}, all else (NCCL, other processes) {others / 2**30:.1f}"
    )


def _dump(config: RunConfig, rank: int) -> str:
    """Write the history of the memory, where it is recorded, and return where it is."""
    if not config.logging.record_memory_history:
        return "; with --record-memory-history a snapshot says what was allocated where"
    path: Path = snapshot_path(config, rank)
    torch.cuda.memory._dump_snapshot(str(path))
    return f"; open {path} at https://pytorch.org/memory_viz"


@contextmanager
def explaining_damaged_libraries(rank: int) -> Iterator[None]:
    """Raise TrainingError, which says what to delete, where a kept library cannot be loaded in the block."""
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        folder, found = cache_dir(), _DAMAGED.search(str(error))
        if found is None or not found[1].startswith(folder):
            raise
        raise TrainingError(
            f"--compile: rank {rank} on {socket.gethostname()} finds {found[1]} damaged ({found[2]}), which "
            f"torch.compile has kept there: a run was killed while it was written, or the disk was full. "
            f"Delete {folder} and start again"
        ) from error

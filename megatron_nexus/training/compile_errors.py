"""Compile errors: what a run says where a library that torch.compile has kept is damaged, and what to delete.

The compiler writes libraries under their final names. A run that is killed meanwhile, or a disk that is full,
leaves a part of one, which every later run loads.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_nexus.errors import TrainingError

_DAMAGED = re.compile(r"(\S+\.so): (file too short|invalid ELF header|.*cannot read file data.*|ELF .*)")
"""How the loader of libraries says it."""


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

"""Random numbers of the elements of a logical tensor: a function of (key, element), whatever rank draws them.

The elements are numbered in row-major order and drawn in blocks of fixed size, each from its own counter of
a Philox generator. A rank draws the blocks that its box touches and keeps what lies inside.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron_nexus.spec.shard import Box

BLOCK = 1 << 16

Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Return so many numbers of a generator, of which the first are the same however many are asked for."""


def draw_box(key: str, shape: tuple[int, ...], box: Box, draw: Draw, dtype: npt.DTypeLike) -> np.ndarray:
    """Return the numbers of the part `box` of a tensor of `shape`, in `box.sizes`."""
    columns = int(np.prod(shape[1:], dtype=np.int64))
    values = np.empty(box.sizes, dtype=dtype)
    # Bands of rows of about 64 blocks each, so that drawing a column part needs little memory.
    rows, end = max(1, 64 * BLOCK // max(1, columns)), box.offsets[0] + box.sizes[0]
    for first in range(box.offsets[0], end, rows):
        last = min(first + rows, end)
        band = _draw_range(key, first * columns, last * columns, draw)
        band = band.reshape(last - first, *shape[1:])
        values[first - box.offsets[0] : last - box.offsets[0]] = band[(slice(None), *box.index[1:])]
    return values


def _draw_range(key: str, start: int, stop: int, draw: Draw) -> np.ndarray:
    """Return the numbers of the elements [start, stop)."""
    philox_key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    first, last = start // BLOCK, (stop - 1) // BLOCK
    drawn = [
        # The block number sits in the counter's highest word: blocks never meet.
        draw(
            np.random.Generator(np.random.Philox(key=philox_key, counter=block << 192)),
            min(BLOCK, stop - block * BLOCK),
        )
        for block in range(first, last + 1)
    ]
    return np.concatenate(drawn)[start - first * BLOCK :]

"""Initial values: a function of (seed, parameter name, element), so every topology starts alike, bit for bit.

The elements of a logical tensor are numbered in row-major order and drawn in blocks of fixed size, each
from its own counter of a Philox generator keyed by seed and name. A rank draws the blocks that its box
touches and keeps what lies inside.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from megatron_nexus.spec.param import Constant, ParamSpec
from megatron_nexus.spec.shard import Box, Shard

BLOCK = 1 << 16


def _normal_range(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Standard normal float32 values of the elements [start, stop) of the parameter `name`."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    first, last = start // BLOCK, (stop - 1) // BLOCK
    drawn = [
        # The block number sits in the counter's highest word: blocks never meet.
        np.random.Generator(np.random.Philox(key=key, counter=block << 192)).standard_normal(
            min(BLOCK, stop - block * BLOCK), dtype=np.float32
        )
        for block in range(first, last + 1)
    ]
    return np.concatenate(drawn)[start - first * BLOCK :]


def _row_bands(box: Box, columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges of `box` of about 64 blocks each, so that drawing a column part needs little memory."""
    rows = max(1, 64 * BLOCK // max(1, columns))
    begin, end = box.offsets[0], box.offsets[0] + box.sizes[0]
    for first in range(begin, end, rows):
        yield first, min(first + rows, end)


def logical_values(spec: ParamSpec, seed: int, box: Box) -> np.ndarray:
    """Initial values of the part `box` of the logical tensor, float32."""
    if isinstance(spec.init, Constant):
        return np.full(box.sizes, spec.init.value, dtype=np.float32)
    columns = spec.numel // spec.shape[0]
    values = np.empty(box.sizes, dtype=np.float32)
    inner = tuple(slice(o, o + s) for o, s in zip(box.offsets[1:], box.sizes[1:], strict=True))
    for first, last in _row_bands(box, columns):
        band = _normal_range(seed, spec.name, first * columns, last * columns)
        band = band.reshape(last - first, *spec.shape[1:])
        values[first - box.offsets[0] : last - box.offsets[0]] = band[(slice(None), *inner)]
    values *= np.float32(spec.init.std)
    return values


def local_values(spec: ParamSpec, shard: Shard, seed: int) -> torch.Tensor:
    """Initial values of this rank's tensor, float32 on the CPU, with zeros in the padding."""
    box = shard.box(spec)
    local = torch.zeros(shard.local_shape(spec), dtype=torch.float32)
    if box.numel:
        local[tuple(slice(0, size) for size in box.sizes)] = torch.from_numpy(logical_values(spec, seed, box))
    return local

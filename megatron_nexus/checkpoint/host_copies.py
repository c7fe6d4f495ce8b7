"""Copies of tensors in host memory: of a GPU's asynchronously, into pinned buffers.

A copy from a GPU into memory that the system may page out goes through a small buffer of the driver, at a
fraction of the link's rate, and the host waits for it. Pinned buffers come from torch's allocator, which
keeps them for the next save and rounds each up to a power of two. On a CPU the same code copies into plain
memory. Untested on a GPU.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class _Copies:
    """Copies of tensors that are on one device; whatever changes those later on its stream comes after."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned) for tensor in tensors
        ]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=pinned)
        self._made: torch.cuda.Event | None = None
        if pinned:
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(device))

    def wait(self) -> Iterator[Tensor]:
        """Yield the copies, once all are made."""
        if self._made is not None:
            self._made.synchronize()
        yield from self._copies


def held(tensors: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Begin to copy all, into as much host memory, and return the copies, for which the first `next` waits.

    The tensors, which are on `device`, may change as soon as this returns.
    """
    return _Copies(tensors, device).wait()


def passing(tensors: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield each in host memory; from a GPU a copy, while the next is being copied. Nothing may change."""
    if device.type == "cpu":
        yield from tensors
        return
    begun: list[_Copies] = []
    for tensor in tensors:
        begun.append(_Copies([tensor], device))
        if len(begun) > 1:
            yield from begun.pop(0).wait()
    for copies in begun:
        yield from copies.wait()

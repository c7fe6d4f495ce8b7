"""Tracker: what operations allocate, free and compute while it is active, and the ranks that do not exist.

All sizes in bytes.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_nexus.planner.kernels import NO_KERNEL, Kernel, Kind, Operation, kernel_of, tensor_bytes

Swing: TypeAlias = tuple[int, int]
"""Bytes of activations over some operations: the most above the level before them, and the level after."""

Events: TypeAlias = list[Swing | str]
"""Swings, KEPT, and the name within its layer of each parameter whose gradient leaves the activations."""


@dataclass
class Mark:
    """What was logged between two marks."""

    events: Events
    operations: list[Operation] = field(default_factory=list)


class Tracker(TorchDispatchMode):
    """Logs the bytes of every storage that an operation makes, again when its last tensor is gone, and what
    the operation is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int | str] = []
        self.operations: list[Operation] = []
        self.sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        self.numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self.parameters: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.storages = 0

    def __torch_dispatch__(
        self,
        func: "torch._ops.OpOverload[..., object]",
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        result, made = func(*args, **kwargs), False
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.sizes and storage not in self.parameters:
                    size = self.sizes[storage] = [storage.nbytes()]
                    self.log += size
                    weakref.finalize(storage, self._freed, size)
                    made = True
        if (made or func._schema.is_mutable) and name not in NO_KERNEL:
            self.record(kernel_of(name, (args, kwargs), result), (args, kwargs), result)
        return result

    def record(self, kernel: Kernel, inputs: object, outputs: object) -> None:
        """Note an operation."""
        self.operations.append(Operation(kernel, self._bytes(inputs), self._bytes(outputs)))

    def _bytes(self, tensors: object) -> dict[int, int]:
        """Return the bytes of each storage of some tensors, by its number."""
        sizes: dict[int, int] = {}
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (number := self.numbers.get(storage)) is None:
                    self.storages += 1
                    number = self.numbers[storage] = self.storages
                sizes[number] = max(sizes.get(number, 0), tensor_bytes(tensor))
        return sizes

    def _freed(self, size: list[int]) -> None:
        self.log += [-bytes_ for bytes_ in size]

    def take_gradient(self, parameter: Tensor, name: str) -> None:
        """Move a complete gradient out of the activations."""
        assert parameter.grad is not None
        size = self.sizes.pop(parameter.grad.untyped_storage(), [])
        self._freed(size)
        size.clear()
        self.log.append(name)
        parameter.grad = None

    def mark(self) -> Mark:
        """Return what was logged since the last call, runs of bytes as one swing each."""
        mark = Mark([], self.operations)
        self.operations = []
        most = level = 0
        for entry in [*self.log, ""]:
            if isinstance(entry, int):
                level += entry
                most = max(most, level)
                continue
            if most or level:
                mark.events.append((most, level))
                most = level = 0
            if entry:
                mark.events.append(entry)
        self.log.clear()
        return mark


class FakeProcessGroup:
    """A tensor-parallel group whose other ranks do not exist: its collectives return at once."""

    def __init__(self, size: int, tracker: Tracker) -> None:
        self._size = size
        self._tracker = tracker

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0

    def allreduce(self, *arguments: object) -> None:
        self._record(2, arguments)

    def all_gather_single(self, *arguments: object) -> None:
        self._record(1, arguments)

    # The last two are called by torch before 2.13.
    reduce_scatter_single = _allgather_base = _reduce_scatter_base = all_gather_single

    def _record(self, passes: int, arguments: tuple[object, ...]) -> None:
        """Note a ring that passes the larger of its tensors `passes` times, but for each rank's own part."""
        largest = max(tensor_bytes(x) for x in tree_leaves(arguments) if isinstance(x, Tensor))
        sent = passes * largest * (self._size - 1) / self._size
        self._tracker.record(Kernel(Kind.COLLECTIVE, moved=sent), arguments, arguments)

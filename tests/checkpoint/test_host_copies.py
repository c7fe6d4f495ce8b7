"""Copies in host memory. There is no GPU here: what would be asked of one is intercepted."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_nexus.checkpoint.host_copies import held, passing

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


class Asked(TorchFunctionMode):
    """Records what copies are asked for; pinned memory, which needs a GPU, becomes plain memory."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self._pinned: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        words = dict(kwargs or {})
        if function is torch.empty:
            pinned = words.pop("pin_memory")
            made = function(*args, **words)
            self._pinned += [made] if pinned else []
            return made
        if function is Tensor.copy_:
            asynchronous = words["non_blocking"] and any(args[0] is buffer for buffer in self._pinned)
            self.events.append("copy" if asynchronous else "copy that waits")
        elif function in (Tensor.to, Tensor.cpu, Tensor.item, Tensor.clone):
            self.events.append("copy that waits")
        return function(*args, **words)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    class Event:
        def record(self, stream: object) -> None:
            assert stream == f"stream of {CUDA}"
            mode.events.append("record")

        def synchronize(self) -> None:
            mode.events.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with Asked() as mode:
        yield mode


def tensors() -> list[Tensor]:
    return [torch.arange(4.0) + i for i in range(3)]


def test_training_goes_on_while_a_gpus_tensors_are_copied_into_pinned_buffers(asked: Asked) -> None:
    copies = held(tensors(), CUDA)
    assert asked.events == ["copy", "copy", "copy", "record"]
    assert [copy.tolist() for copy in copies] == [x.tolist() for x in tensors()]
    assert asked.events == ["copy", "copy", "copy", "record", "wait"]


def test_a_gpus_next_tensor_is_copied_while_the_one_before_is_written(asked: Asked) -> None:
    for number, copy in enumerate(passing(tensors(), CUDA)):
        assert torch.equal(copy, tensors()[number])
        asked.events.append("write")
    begin, write = ["copy", "record"], ["wait", "write"]
    assert asked.events == [*begin, *begin, *write, *begin, *write, *write]


def test_a_cpus_tensors_may_change_once_they_are_held_and_pass_as_they_are(asked: Asked) -> None:
    values = tensors()
    assert all(one is other for one, other in zip(passing(values, CPU), values, strict=True))
    copies = held(values, CPU)
    assert asked.events == 3 * ["copy that waits"]
    values[1].zero_()
    assert [copy.tolist() for copy in copies] == [x.tolist() for x in tensors()]

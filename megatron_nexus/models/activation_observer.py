"""ActivationObserver: what goes into and comes out of each activation, for whoever asks between two steps."""

from collections.abc import Callable, Sequence

from torch import Tensor

Seen = Callable[[Tensor, Tensor, Tensor], None]
"""Called with the matrix that reads the units, and the units before and after the activation, [.., units]."""


class ActivationObserver:
    """Hands the activations of a stage to `callback` while there is one; without, layers run as ever.

    Set it under `torch.compiler.set_stance("force_eager")`: compiled blocks are those without.
    """

    def __init__(self) -> None:
        self.callback: Seen | None = None

    def report(self, readers: Sequence[Tensor], before: Tensor, after: Tensor) -> None:
        """Report the units that `readers` read: [.., units] of one, [G, .., units] of G readers."""
        if self.callback is None:
            return
        if len(readers) == 1:
            self.callback(readers[0], before, after)
            return
        for reader, inputs, outputs in zip(readers, before, after, strict=True):
            self.callback(reader, inputs, outputs)

    def around(self, activation: Callable[..., Tensor], readers: Sequence[Tensor]) -> Callable[..., Tensor]:
        """Return `activation`, which reports its first input and its output."""
        if self.callback is None:
            return activation

        def observed(*inputs: Tensor) -> Tensor:
            outputs = activation(*inputs)
            self.report(readers, inputs[0], outputs)
            return outputs

        return observed

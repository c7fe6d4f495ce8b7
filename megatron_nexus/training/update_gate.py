"""Update gate: asks, between the gradient norm and Adam's step, whether a step's update is to be made.

DeepSpeed computes the norm, clips, and calls the inner optimizer's `step` (once, or once a buffer). That call
is what is withheld: master weights, moments and Adam's count of steps stay as they are. What DeepSpeed does
next, cast the master weights and gather them, then changes nothing.
"""

from collections.abc import Callable

from megatron_nexus.training.zero_state import DeepSpeedEngine

Admits = Callable[[float | None, float], bool]
"""Whether a step of this loss (None where it is not known yet) and gradient norm is to be made."""


class UpdateGate:
    """Stands before the inner optimizer of an engine; open unless a step is given something to ask."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._zero = engine.optimizer
        self._make = self._zero.optimizer.step
        self._zero.optimizer.step = self._step
        self._admits: Admits | None = None
        self.loss: float | None = None
        """The loss of the step, where it is known, on all ranks, before its update is decided."""
        self._decided: bool | None = None

    def begin(self, admits: Admits) -> None:
        """Begin a step that `admits` is asked about."""
        self._admits, self.loss, self._decided = admits, None, None

    @property
    def was_made(self) -> bool:
        """Whether the update of the step was made; not of gradients that are not finite."""
        return bool(self._decided)

    def _step(self, *arguments: object, **named: object) -> object:
        if self._decided is None:
            # All ranks have the same norm: it is the result of an all-reduce.
            norm = float(self._zero._global_grad_norm)
            self._decided = self._admits is None or self._admits(self.loss, norm)
        return self._make(*arguments, **named) if self._decided else None

"""fp32 sums of the bf16 gradients of a step: those of BF16_Optimizer, without its copies.

DeepSpeed zeroes the sums after each step, casts each gradient into a tensor of its own and adds that to its
sum. Here the first gradient of a step is written into the sum, others are cast as they are added: 16 bytes a
parameter less are moved in the first micro-batch of a step, 8 in each other.
"""

from collections.abc import Sequence

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

_CPU_ELEMENTS = 1 << 18
"""Gradients widened at a time on a CPU, where torch makes an fp32 copy of what it adds to an fp32 tensor."""


class GradientSums:
    """The sums of one optimizer, in place of its own way of keeping them."""

    def __init__(self, zero: BF16_Optimizer) -> None:
        assert all(hasattr(zero, name) for name in ("_update_hp_grad", "clear_hp_grads"))
        self._zero = zero
        zero._update_hp_grad = self._add
        zero.clear_hp_grads = self._clear

    @torch.no_grad()
    def _add(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool) -> None:
        """Add a parameter's gradient to its sum, or begin the sum with it."""
        grad = parameter.grad
        if grad is None:
            return
        total = self._zero.fp32_groups_gradients[group][index].view(grad.shape)
        has_one = self._zero.fp32_groups_has_gradients[group]
        if has_one[index]:
            _add_to(total, grad)
        else:
            total.copy_(grad)
        parameter._hp_grad = total  # type: ignore[attr-defined]  # what DeepSpeed's own functions read
        has_one[index] = True
        if clear_lp_grads:
            grad.zero_()

    def _clear(self) -> None:
        """Have the next gradient of each parameter begin its sum."""
        for has_one in self._zero.fp32_groups_has_gradients:
            has_one[:] = [False] * len(has_one)

    def complete(self, groups: Sequence[int] | None = None) -> None:
        """Zero the sums of parameters without a gradient in this step, of some parameter groups or all."""
        for group in range(len(self._zero.bf16_groups)) if groups is None else groups:
            sums = self._zero.fp32_groups_gradients[group]
            for total, has_one in zip(sums, self._zero.fp32_groups_has_gradients[group], strict=True):
                if not has_one:
                    total.zero_()


def _add_to(total: Tensor, grad: Tensor) -> None:
    size = _CPU_ELEMENTS if total.device.type == "cpu" else total.numel()
    for sums, grads in zip(total.view(-1).split(size), grad.reshape(-1).split(size), strict=True):
        sums.add_(grads)

"""A stand-in of `training.linear_cross_entropy`: the same products and blocks, on tensors without elements.

The function of DeepSpeed counts labels, which such tensors do not have. N tokens, D hidden, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from megatron_nexus.kernels.cross_entropy import linear_block_rows
from megatron_nexus.models.decoder import DecoderStage, Head
from megatron_nexus.parallel.tensor_parallel import TensorParallel


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    tp: TensorParallel
    rows: int


class _Loss(Function):
    @staticmethod
    def forward(
        ctx: _Context, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, tp: TensorParallel
    ) -> Tensor:
        loss_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        largest_N, sum_N = torch.empty_like(loss_N), torch.empty_like(loss_N)
        masks = [torch.ones_like(labels_N, dtype=torch.bool) for _ in range(2)]
        ctx.tp, ctx.rows = tp, linear_block_rows(len(x_ND), len(weight_VD))
        for first in range(0, len(x_ND), ctx.rows):
            logits = F.linear(x_ND[first : first + ctx.rows], weight_VD).float()
            largest = tp.maximum(logits.amax(dim=-1))
            total = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
            tp.sum(torch.stack([total, largest]))
            loss_N[first : first + ctx.rows] = total
            del logits
        ctx.save_for_backward(x_ND, weight_VD, labels_N.clone(), *masks, largest_N, sum_N)
        return loss_N

    @staticmethod
    def backward(ctx: _Context, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, *_ = ctx.saved_tensors
        scale_N1, largest_N1 = grad_N[:, None].clone(), grad_N[:, None].clone()
        x_grad_ND = torch.zeros_like(x_ND, dtype=torch.float32)
        weight_grad_VD = torch.empty_like(weight_VD)
        blocks = -(-len(x_ND) // ctx.rows)
        columns = max(1, -(-len(weight_VD) // blocks))
        for first in range(0, len(weight_VD), columns):
            block_vD = weight_VD[first : first + columns]
            wide_Nv = F.linear(x_ND, block_vD).float().add_(largest_N1).exp_().mul_(scale_N1)
            grad_Nv = wide_Nv.to(x_ND.dtype)
            weight_grad_VD[first : first + columns] = grad_Nv.t() @ x_ND
            if x_ND.device.type == "cpu":  # a GPU has products of bf16 that add to fp32
                x_grad_ND.addmm_(grad_Nv.float(), block_vD.float())
            else:
                x_grad_ND.add_(grad_Nv @ block_vD)
        ctx.tp.sum(x_grad_ND)
        return x_grad_ND.to(x_ND.dtype), weight_grad_VD, None, None


class LinearLoss:
    """Head and loss in one of a stage that has a head."""

    def __init__(self, stage: DecoderStage, tp: TensorParallel) -> None:
        self._heads, self._tp = [layer for layer in stage.layers if isinstance(layer, Head)], tp

    def __call__(self, x_TBD: Tensor, labels_BT: Tensor) -> Tensor:
        """[T, B, D] and labels [B, T] -> a loss."""
        (head,) = self._heads
        x_ND = self._tp.enter_summed(x_TBD).flatten(0, 1)
        weight_VD = head.projection.get_parameter("weight")
        return _Loss.apply(x_ND, weight_VD, labels_BT.t().flatten(), self._tp).mean()

"""Several linear maps at once: of one input by one product, of as many inputs by one batched product.

    concatenated    y_g = x W_g^T        one product with [W_1; ...; W_G] of [G n, k]
    grouped         y_g = x_g W_g^T      one batched product

The weights stay tensors of their own. They are put together at each use, forward and backward, and not kept:
a few MB copied for products of thousands of rows. In backward of the first the G gradients of x are one
product, which sums them in float32; of separate maps each is rounded to the type of x before the sum.

G maps, k inputs and n outputs of each.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]


class _ConcatenatedLinear(Function):
    @staticmethod
    def forward(ctx: _Saved, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, torch.cat(weights))

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        products = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        weight_grads = products.split([len(w) for w in weights])
        return (grad @ torch.cat(weights), *weight_grads)


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: _Saved, x_GNk: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x_GNk, *weights)
        return torch.bmm(x_GNk, torch.stack(weights).transpose(1, 2))

    @staticmethod
    def backward(ctx: _Saved, grad_GNn: Tensor) -> tuple[Tensor, ...]:
        x_GNk, *weights = ctx.saved_tensors
        weight_grads = torch.bmm(grad_GNn.transpose(1, 2), x_GNk).unbind()
        return (torch.bmm(grad_GNn, torch.stack(weights)), *weight_grads)


def concatenated_linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    """X [..., k] and G weights [n, k] -> the outputs of all, side by side: [..., G n]."""
    return _ConcatenatedLinear.apply(x, *weights)


def grouped_linear(x: Tensor, weights: list[Tensor], checkpointed: bool = False) -> Tensor:
    """G inputs [G, ..., k] and as many weights [n, k], all of one shape -> [G, ..., n].

    `checkpointed`: the caller is inside torch's checkpoint. That drops what torch's own product would keep,
    the copy of the weights too, and ends before a product is repeated; a Function saves after its product.
    """
    x_GNk = x.flatten(1, -2)
    if checkpointed:
        y_GNn = torch.bmm(x_GNk, torch.stack(weights).transpose(1, 2))
    else:
        y_GNn = _GroupedLinear.apply(x_GNk, *weights)
    return y_GNn.view(*x.shape[:-1], len(weights[0]))

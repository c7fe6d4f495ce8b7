"""Causal attention whose backward pass is plain matrix products: for CPUs and short samples, compiled.

torch's kernel for CPUs takes about six times as long backward as forward. Here forward is that kernel, which
also gives each query's log-sum-exp L. Backward is, for a block of queries at a time and the keys up to it,

    P = exp(scale Q K^T - L)    dV += P^T dO    dS = scale P * (dO V^T - rowsum(dO * O))
    dQ = dS K                   dK += dS^T Q

(the backward pass of FlashAttention-2, Dao, 2023). torch.compile makes one kernel of what is between two
products.

B batch, N heads, T tokens, H head size, R queries of a block and E keys up to its last.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

BLOCK = 128
"""Queries of a block: at 512 tokens five eighths of all scores are computed."""
LONGEST = 1024
"""Tokens up to which it is the faster one: the scores of a block and all heads no longer fit into caches."""


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    scale: float


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx: _Saved, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse_BNT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse_BNT)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *tensors, lse_BNT = ctx.saved_tensors
        # Else each product of each block copies its operands.
        q, k, v, out, grad = (x.contiguous() for x in (*tensors, grad))
        wide = lse_BNT.dtype
        own_BNT1 = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
        dq: list[Tensor] = []
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        tokens = q.shape[2]
        for first in range(0, tokens, BLOCK):
            end = min(first + BLOCK, tokens)
            rows, q_R, grad_R = slice(first, end), q[:, :, first:end], grad[:, :, first:end]
            k_E, v_E = k[:, :, :end], v[:, :, :end]
            later = torch.ones(end - first, end, dtype=torch.bool, device=q.device).triu(first + 1)
            scores_RE = (q_R @ k_E.transpose(-1, -2)).to(wide) * ctx.scale
            p_RE = (scores_RE - lse_BNT[:, :, rows, None]).exp().masked_fill(later, 0.0)
            dp_RE = (grad_R @ v_E.transpose(-1, -2)).to(wide)
            ds_RE = (p_RE * (dp_RE - own_BNT1[:, :, rows]) * ctx.scale).to(q.dtype)
            dq.append(ds_RE @ k_E)
            dk[:, :, :end] += ds_RE.transpose(-1, -2) @ q_R
            dv[:, :, :end] += p_RE.to(q.dtype).transpose(-1, -2) @ grad_R
        return torch.cat(dq, dim=2), dk.to(k.dtype), dv.to(v.dtype), None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Queries, keys and values [B, N, T, H] of as many heads, on a CPU -> [B, N, T, H]."""
    return _CausalAttention.apply(q, k, v, scale)

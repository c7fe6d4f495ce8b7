"""Stand-ins of kernels, that allocate what these do and compute nothing; each is recorded as one.

Of accelerators, which CPUs have not:

    fused RMSNorm       keeps its input and one fp32 number a row (aten::_fused_rms_norm)
    fused attention     keeps queries, keys, values, output and one fp32 number a row (flash, cuDNN); its
                        backward sums the queries' gradient in fp32, and keys' and values' by head

Of all devices the cross entropy of bf16 logits: of its thousands of chunks one stands for all.

T tokens, B batch, N heads of queries (in the cross entropy: tokens), H head size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from megatron_nexus.kernels.cross_entropy import CHUNK_ELEMENTS, CHUNK_ELEMENTS_OF_OTHERS, CrossEntropyKernel
from megatron_nexus.planner.kernels import Kernel, Kind, attention_kernel, tensor_bytes

Record = Callable[[Kernel, tuple[Tensor, ...], tuple[Tensor, ...]], None]
"""Notes a kernel, what it reads and what it writes."""


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    record: Record
    causal: bool


class _Attention(Function):
    @staticmethod
    def forward(ctx: _Context, q: Tensor, k: Tensor, v: Tensor, causal: bool, record: Record) -> Tensor:
        batch, heads, tokens, size = q.shape
        out = q.new_empty(batch, tokens, heads, size).transpose(1, 2)
        log_sums = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.record, ctx.causal = record, causal
        record(attention_kernel(q, k, causal, backward=False), (q, k, v), (out, log_sums))
        return out

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        sums = torch.empty_like(q, dtype=torch.float32)
        by_head = [torch.empty_like(q) for _ in (k, v) if k.shape[1] < q.shape[1]]
        grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        kernel = attention_kernel(q, k, ctx.causal, backward=True)
        ctx.record(kernel, (q, k, v, out, log_sums, grad), grads)
        del sums, by_head
        return *grads, None, None


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, gain: Tensor | None, record: Record) -> Tensor:
        y = torch.empty_like(x)
        inverse_rms = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, *([] if gain is None else [gain]), inverse_rms)
        ctx.record = record
        record(_norm_kernel(x, y), (x,), (y,))
        return y

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *gain, _ = ctx.saved_tensors
        grads = [torch.empty_like(x), *(torch.empty_like(g) for g in gain)]
        ctx.record(_norm_kernel(x, grad, grads[0]), (x, grad), tuple(grads))
        return grads[0], grads[1] if gain else None, None


def _norm_kernel(*tensors: Tensor) -> Kernel:
    return Kernel(Kind.POINTWISE, moved=sum(map(tensor_bytes, tensors)))


def cross_entropy_kernel(record: Record, compiled: bool) -> CrossEntropyKernel:
    """Return the cross entropy of logits [N, V]: compiled, or of bf16 ones in chunks of torch's kernels.

    A compiled one reads logits twice forward, and reads and writes them backward. Else bytes a logit: 6
    forward (log-softmax in fp32), 20 backward (softmax in fp32, its product in place, the cast).
    """

    def run(logits_NV: Tensor, in_chunks: int) -> None:
        bytes_per_logit = 2 * logits_NV.element_size() if compiled else in_chunks
        tokens, vocabulary = logits_NV.shape
        elements = CHUNK_ELEMENTS.get(logits_NV.device.type, CHUNK_ELEMENTS_OF_OTHERS)
        rows = min(tokens, max(1, elements // max(1, vocabulary)))
        if not compiled:
            logits_NV.new_empty(rows, vocabulary, dtype=torch.float32)
        kernel = Kernel(
            Kind.POINTWISE,
            moved=bytes_per_logit * logits_NV.numel(),
            count=1 if compiled else 4 * tokens / rows,
        )
        record(kernel, (logits_NV,), (logits_NV,))

    def statistics(logits_NV: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
        run(logits_NV, 6)
        lse_N, in_column_N = (logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(2))
        return lse_N, in_column_N

    def gradient_(logits_NV: Tensor, *_: Tensor) -> None:
        run(logits_NV, 20)

    return CrossEntropyKernel(statistics, lambda own_lse_N, lse_N: own_lse_N - lse_N, gradient_)


@contextmanager
def accelerator_kernels(record: Record) -> Iterator[None]:
    """Have torch.nn.functional's attention and RMSNorm be those of accelerators, and `record` them."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return _Attention.apply(query, key, value, is_causal, record)

    def rms_norm(
        input: Tensor,  # noqa: A002 - as torch has it
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        return _RmsNorm.apply(input, weight, record)

    before = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention, F.rms_norm = attention, rms_norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = before

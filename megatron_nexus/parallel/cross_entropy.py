"""Cross entropy of logits whose vocabulary is split over tensor-parallel ranks.

    loss_n = log sum_v exp(z_nv) - z_n,label        its mean over tokens is the loss of pretraining

z [N, V_local] this rank's logits, N tokens. Logits of padding rows of the head are no part of the sum: a
zero row would still give the logit 0.

- float32 and more: two all-reduces forward (N maxima; N sums and N label logits together).
- Shorter types, and any compiled by torch.compile (`kernels.cross_entropy`): one all-gather of two numbers a
  token.

None backward.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from megatron_nexus.kernels.cross_entropy import CHUNKED, CrossEntropyKernel
from megatron_nexus.parallel.tensor_parallel import TensorParallel


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    vocabulary_range: tuple[int, int]
    kernel: CrossEntropyKernel
    logits_dtype: torch.dtype


def _columns(labels_N: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return whether this rank has the logit of each label, and its column, 0 where it has not."""
    mine_N = (labels_N >= start) & (labels_N < stop)
    return mine_N, torch.where(mine_N, labels_N - start, 0)


class _InPlace(Function):
    """Turns logits of float32 or more into exponentials, which are kept with their sum of each token."""

    @staticmethod
    def forward(
        ctx: _Context, logits_NV: Tensor, labels_N: Tensor, start: int, stop: int, tp: TensorParallel
    ) -> Tensor:
        z_NV = logits_NV.detach()
        if stop - start < z_NV.shape[1]:
            z_NV[:, stop - start :] = -torch.inf
        largest_N = tp.maximum(z_NV.amax(dim=1))
        z_NV -= largest_N[:, None]
        mine_N, column_N = _columns(labels_N, start, stop)
        label_logit_N = torch.where(mine_N, z_NV.gather(1, column_N[:, None])[:, 0], 0.0)
        exp_NV = z_NV.exp_()
        both = tp.sum(torch.stack([exp_NV.sum(dim=1), label_logit_N]))
        sum_N, label_logit_N = both[0].clone(), both[1]  # a view would keep both
        ctx.save_for_backward(exp_NV, labels_N, sum_N)
        ctx.vocabulary_range = start, stop
        return sum_N.log() - label_logit_N

    @staticmethod
    def backward(ctx: _Context, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        exp_NV, labels_N, sum_N = ctx.saved_tensors
        mine_N, column_N = _columns(labels_N, *ctx.vocabulary_range)
        grad_NV = exp_NV.mul_((grad_N / sum_N)[:, None])
        grad_NV.scatter_add_(1, column_N[:, None], torch.where(mine_N, -grad_N, 0.0)[:, None])
        return grad_NV, None, None, None, None


class _InOwnType(Function):
    """Keeps the logits, and of each token what the kernel keeps: one number."""

    @staticmethod
    def forward(
        ctx: _Context,
        logits_NV: Tensor,
        labels_N: Tensor,
        start: int,
        stop: int,
        tp: TensorParallel,
        kernel: CrossEntropyKernel,
    ) -> Tensor:
        z_NV = logits_NV.detach()
        if stop - start < z_NV.shape[1]:
            z_NV[:, stop - start :] = torch.finfo(z_NV.dtype).min  # a rank may hold padding only
        mine_N, column_N = _columns(labels_N, start, stop)
        own_lse_N, in_column_N = kernel.statistics(z_NV, column_N)
        by_rank = tp.all_gather_stat(torch.stack([own_lse_N, torch.where(mine_N, in_column_N, 0.0)]))
        lse_N, label_logit_N = by_rank[:, 0].logsumexp(dim=0), by_rank[:, 1].sum(dim=0)
        ctx.save_for_backward(z_NV, labels_N, kernel.kept(own_lse_N, lse_N))
        ctx.vocabulary_range, ctx.kernel = (start, stop), kernel
        return lse_N - label_logit_N

    @staticmethod
    def backward(ctx: _Context, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        z_NV, labels_N, kept_N = ctx.saved_tensors
        mine_N, column_N = _columns(labels_N, *ctx.vocabulary_range)
        ctx.kernel.gradient_(z_NV, column_N, torch.where(mine_N, -grad_N, 0.0), kept_N, grad_N)
        return z_NV, None, None, None, None, None


class _Divergence(Function):
    """KL divergence of the reference's distribution to that of the logits, which are kept as they are.

    Forward: two all-reduces of N maxima, one of 3 N sums. Backward: none.
    """

    @staticmethod
    def forward(
        ctx: _Context, logits_NV: Tensor, reference_NV: Tensor, count: int, tp: TensorParallel
    ) -> Tensor:
        """`count` of the V columns are logical, the others padding."""
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        z_NV, r_NV = (x.detach().to(wide, copy=True) for x in (logits_NV, reference_NV))
        for x_NV in (z_NV, r_NV):
            x_NV[:, count:] = -torch.inf
            x_NV -= tp.maximum(x_NV.amax(dim=1))[:, None]
        exp_z_NV, exp_r_NV = z_NV.exp(), r_NV.exp()
        difference_NV = torch.where(exp_r_NV > 0, exp_r_NV * (r_NV - z_NV), 0.0)  # 0 log 0 = 0
        sums = tp.sum(torch.stack([exp_z_NV.sum(1), exp_r_NV.sum(1), difference_NV.sum(1)]))
        sum_z_N, sum_r_N, difference_N = sums
        p_NV, q_NV = exp_z_NV / sum_z_N[:, None], exp_r_NV / sum_r_N[:, None]
        ctx.save_for_backward(p_NV.sub_(q_NV))
        ctx.logits_dtype = logits_NV.dtype
        return difference_N / sum_r_N + sum_z_N.log() - sum_r_N.log()

    @staticmethod
    def backward(ctx: _Context, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        grad_NV = ctx.saved_tensors[0] * grad_N[:, None]
        return grad_NV.to(ctx.logits_dtype), None, None, None


def vocabulary_parallel_divergence(
    logits: Tensor, reference: Tensor, vocabulary_range: tuple[int, int], tp: TensorParallel
) -> Tensor:
    """Return KL(reference || model) of each token in nats [N], the same on every tensor-parallel rank.

    `logits` and `reference`, logits too, [..., V_local] as for the cross entropy; the gradient p - q goes to
    `logits` alone. Nothing is overwritten.
    """
    start, stop = vocabulary_range
    of_logits_NV, of_reference_NV = logits.flatten(0, -2), reference.flatten(0, -2)
    return _Divergence.apply(of_logits_NV, of_reference_NV, stop - start, tp)


@torch.no_grad()
def vocabulary_parallel_scores(
    logits: Tensor, labels: Tensor, vocabulary_range: tuple[int, int], tp: TensorParallel
) -> Tensor:
    """Log-probability of each label in nats, and 1 where it is the likeliest token, the first of equals.

    `logits` [..., V_local] and `labels` [...] as for the cross entropy; the result is [2, ...], the same on
    every tensor-parallel rank. Three all-reduces: maxima, sums with label logits, first places.
    """
    start, stop = vocabulary_range
    z_NV = logits.flatten(0, -2)[:, : stop - start]
    z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32))
    labels_N = labels.flatten()
    # A rank may hold padding only.
    mine_N = z_NV.amax(dim=1) if stop > start else z_NV.new_full((len(z_NV),), -torch.inf)
    largest_N = tp.maximum(mine_N.clone())
    here_N, column_N = _columns(labels_N, start, stop)
    shifted_NV = z_NV - largest_N[:, None]
    label_N = torch.zeros_like(largest_N)
    first_N = torch.full_like(labels_N, -torch.iinfo(torch.int64).max)
    if stop > start:
        label_N = torch.where(here_N, shifted_NV.gather(1, column_N[:, None])[:, 0], 0.0)
        first_N = torch.where(mine_N == largest_N, -(z_NV.argmax(dim=1) + start), first_N)
    sum_N, label_N = tp.sum(torch.stack([shifted_NV.exp().sum(dim=1), label_N]))
    likeliest_N = -tp.maximum(first_N)
    scores_2N = torch.stack([label_N - sum_N.log(), (likeliest_N == labels_N).to(sum_N.dtype)])
    return scores_2N.view(2, *labels.shape)


def vocabulary_parallel_token_losses(
    logits: Tensor,
    labels: Tensor,
    vocabulary_range: tuple[int, int],
    tp: TensorParallel,
    kernel: CrossEntropyKernel | None = None,
) -> Tensor:
    """Return the cross entropy of each token in nats [N], the same on every tensor-parallel rank.

    `logits` [..., V_local] of this rank's part of the vocabulary, its logical rows `vocabulary_range`
    first, then padding; `labels` [...] global token ids, N of them. The logits, the largest tensor of a step,
    are overwritten, by backward too: nothing may read them afterwards, and backward runs once.
    Without a `kernel` logits of float32 or more take the form that keeps exponentials.
    """
    flat_NV, labels_N = logits.flatten(0, -2), labels.flatten()
    if kernel is None and flat_NV.dtype.itemsize >= torch.float32.itemsize:
        return _InPlace.apply(flat_NV, labels_N, *vocabulary_range, tp)
    return _InOwnType.apply(flat_NV, labels_N, *vocabulary_range, tp, kernel or CHUNKED)


def vocabulary_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocabulary_range: tuple[int, int],
    tp: TensorParallel,
    kernel: CrossEntropyKernel | None = None,
) -> Tensor:
    """Return the mean of the tokens' cross entropies: arguments as of `vocabulary_parallel_token_losses`."""
    return vocabulary_parallel_token_losses(logits, labels, vocabulary_range, tp, kernel).mean()

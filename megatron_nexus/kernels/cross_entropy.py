"""Cross entropy of logits in their own type: of each token one number is kept, the gradient is made in place.

    lse_n = log sum_v exp(z_nv)    loss_n = lse_n - z_n,label    dz_nv = g_n (exp(z_nv - lse_n) - [v = label])

z [N, V] are one rank's logits of N tokens, in bfloat16, say; all is computed in float32 (or float64).
Nothing as large as the logits is kept but the logits themselves, which the gradient overwrites, and besides
them the one number a token that a form needs backward.

`CHUNKED` runs torch's softmax kernels over a few tokens at a time, so that their float32 numbers stay small.
`compiled_kernel()` is the equations above under torch.compile: of each logit forward reads it once or twice,
backward reads it and writes its gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 18}
"""Logits widened at a time: on a CPU 1 MB of float32, which a core's cache holds."""
CHUNK_ELEMENTS_OF_OTHERS = 1 << 25
"""On a GPU 128 MB: a few kernels for each of a few chunks."""


def linear_block_rows(tokens: int, vocabulary: int) -> int:
    """Return of how many tokens the logits are there at once where head and loss are one."""
    return max(1, min(tokens, CHUNK_ELEMENTS_OF_OTHERS // vocabulary))


@dataclass(frozen=True)
class CrossEntropyKernel:
    """The two functions of one form, which differ by rounding from those of the other."""

    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Logits [N, V] and a column of each token -> log sum exp [N], and the logit in that column [N]."""
    kept: Callable[[Tensor, Tensor], Tensor]
    """Log sum exp of these logits and of all ranks' logits [N] -> what backward needs of the two [N]."""
    gradient_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    """Overwrite logits [N, V] by the gradient, given each token's column, what to add there, what was kept
    and the gradient of each token's loss [N]."""


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits_NV.shape
    elements = CHUNK_ELEMENTS.get(logits_NV.device.type, CHUNK_ELEMENTS_OF_OTHERS)
    step = max(1, elements // max(1, vocabulary))
    return (slice(first, first + step) for first in range(0, tokens, step))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunked_statistics(logits_NV: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
    wide, column_N1 = _wide(logits_NV), column_N[:, None]
    in_column_N = logits_NV.gather(1, column_N1)[:, 0].to(wide)
    log_softmax_N = [
        torch.log_softmax(logits_NV[n], dim=1, dtype=wide).gather(1, column_N1[n])[:, 0]
        for n in _chunks(logits_NV)
    ]
    return in_column_N - torch.cat(log_softmax_N), in_column_N


def _share(own_lse_N: Tensor, lse_N: Tensor) -> Tensor:
    """Return this rank's share of each token's sum of exponentials: what is not its own softmax."""
    return (own_lse_N - lse_N).exp()


def _chunked_gradient(
    logits_NV: Tensor, column_N: Tensor, label_grad_N: Tensor, share_N: Tensor, grad_N: Tensor
) -> None:
    factor_N = grad_N * share_N
    for n in _chunks(logits_NV):
        grad = torch.softmax(logits_NV[n], dim=1, dtype=_wide(logits_NV)).mul_(factor_N[n, None])
        logits_NV[n] = grad.scatter_add_(1, column_N[n, None], label_grad_N[n, None])


CHUNKED = CrossEntropyKernel(_chunked_statistics, _share, _chunked_gradient)


def _statistics(logits_NV: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
    wide_NV = logits_NV.to(_wide(logits_NV))
    largest_N = wide_NV.amax(dim=1)
    lse_N = (wide_NV - largest_N[:, None]).exp().sum(dim=1).log() + largest_N
    return lse_N, wide_NV.gather(1, column_N[:, None])[:, 0]


def _lse_of_all(own_lse_N: Tensor, lse_N: Tensor) -> Tensor:
    return lse_N


def _gradient(
    logits_NV: Tensor, column_N: Tensor, label_grad_N: Tensor, lse_N: Tensor, grad_N: Tensor
) -> None:
    grad_NV = grad_N[:, None] * (logits_NV.to(lse_N.dtype) - lse_N[:, None]).exp()
    is_label_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device) == column_N[:, None]
    logits_NV.copy_(grad_NV + torch.where(is_label_NV, label_grad_N[:, None], 0.0))


@cache
def compiled_kernel(backend: str = "inductor") -> CrossEntropyKernel:
    """Return the equations compiled by torch.compile, at the first call for each shape of logits."""
    compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    return CrossEntropyKernel(compiled(_statistics), _lse_of_all, compiled(_gradient))

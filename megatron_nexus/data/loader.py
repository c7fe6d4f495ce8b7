"""Batches of samples for one data-parallel rank, as a function of the samples consumed so far.

B micro batch, T sequence length. Every rank computes its own share: nothing is sent, nothing is kept.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from megatron_nexus.data.answers import IGNORED_LABEL, AnswerTokens
from megatron_nexus.data.blend import Blend
from megatron_nexus.data.samples import TokenWindows


def sample_numbers(
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[range]:
    """Yield the numbers of the samples of each micro-batch, without end: those after `consumed_samples`.

    All ranks and accumulation steps of one global batch together read exactly the samples [c, c + global
    batch), c those consumed before it, whatever the micro batch and the data-parallel size.
    """
    samples_per_step = micro_batch_size * data_parallel_size
    assert global_batch_size % samples_per_step == 0, (global_batch_size, samples_per_step)
    assert 0 <= data_parallel_rank < data_parallel_size, (data_parallel_rank, data_parallel_size)
    # Global batches are whole multiples of a step, so the walk over them is one walk over steps.
    for first in count(consumed_samples + data_parallel_rank * micro_batch_size, samples_per_step):
        yield range(first, first + micro_batch_size)


def micro_batch(
    samples: Blend | TokenWindows, numbers: Sequence[int], packed: bool = False
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """Return (tokens_BT, labels_BT), int64, of the samples of these numbers.

    If `packed`, ((tokens_BT, positions_BT), labels_BT): each token's place in its document, from 0.
    """
    read = np.stack([samples.sample(k) for k in numbers])  # [B, T + 1]
    # By numpy: a copy of torch's would start threads of its own next to those that train.
    tokens_BT, labels_BT = (
        torch.from_numpy(np.ascontiguousarray(part)) for part in (read[:, :-1], read[:, 1:])
    )
    if not packed:
        return tokens_BT, labels_BT
    return (tokens_BT, torch.from_numpy(np.stack([samples.positions(k) for k in numbers]))), labels_BT


def tokens_and_labels(samples: Sequence[AnswerTokens], rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels [rows, T], int64, padded to T = `width` on the right, and by empty rows.

    Padding is 0 in tokens, which no token of a causal model sees, and IGNORED_LABEL in labels.
    """
    tokens_BT = torch.zeros(rows, width, dtype=torch.int64)
    labels_BT = torch.full((rows, width), IGNORED_LABEL, dtype=torch.int64)
    for b, sample in enumerate(samples):
        tokens_BT[b, : len(sample.tokens)] = torch.tensor(sample.tokens)
        labels_BT[b, : len(sample.labels)] = torch.tensor(sample.labels)
    return tokens_BT, labels_BT


def answer_batch(samples: Sequence[AnswerTokens], width: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, labels and loss mask [B, T] of samples, padded on the right to `width` or the longest.

    Tokens as of `tokens_and_labels`; labels of tokens without loss are 0, so that they may index logits. The
    mask is float32: 1 where the label is of an answer.
    """
    width = width or max(len(sample.tokens) for sample in samples)
    tokens_BT, labels_BT = tokens_and_labels(samples, len(samples), width)
    mask_BT = labels_BT != IGNORED_LABEL
    return tokens_BT, labels_BT.masked_fill(~mask_BT, 0), mask_BT.to(torch.float32)

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


def micro_batches(
    samples: Blend | TokenWindows,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    packed: bool = False,
) -> Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
    """Yield (tokens_BT, labels_BT), int64, without end, of the samples of `sample_numbers`.

    If `packed`, ((tokens_BT, positions_BT), labels_BT): each token's place in its document, from 0.
    """
    for numbers in sample_numbers(
        consumed_samples, micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size
    ):
        read = np.stack([samples.sample(k) for k in numbers])  # [B, T + 1]
        # By numpy: a copy of torch's would start threads of its own next to those that train.
        tokens_BT, labels_BT = (
            torch.from_numpy(np.ascontiguousarray(part)) for part in (read[:, :-1], read[:, 1:])
        )
        if packed:
            positions_BT = torch.from_numpy(np.stack([samples.positions(k) for k in numbers]))
            yield (tokens_BT, positions_BT), labels_BT
        else:
            yield tokens_BT, labels_BT


def answer_batch(samples: Sequence[AnswerTokens], width: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, labels and loss mask [B, T] of samples, padded on the right to `width` or the longest.

    tokens int64, 0 in the padding, which no token of a causal model sees. labels int64, those of tokens
    without loss 0, so that they may index logits. The mask is float32: 1 where the label is of an answer.
    """
    longest = max(len(sample.tokens) for sample in samples)
    assert width == 0 or width >= longest, (width, longest)
    shape = (len(samples), width or longest)
    tokens_BT = torch.zeros(shape, dtype=torch.int64)
    labels_BT = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    for b, sample in enumerate(samples):
        tokens_BT[b, : len(sample.tokens)] = torch.tensor(sample.tokens)
        labels_BT[b, : len(sample.labels)] = torch.tensor(sample.labels)
    mask_BT = labels_BT != IGNORED_LABEL
    return tokens_BT, labels_BT.masked_fill(~mask_BT, 0), mask_BT.to(torch.float32)

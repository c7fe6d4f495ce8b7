"""Batches of samples for one data-parallel rank, as a function of the samples consumed so far.

B micro batch, T sequence length. Every rank computes its own share: nothing is sent, nothing is kept.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_nexus.data.samples import TokenWindows

IGNORED_LABEL = -100
"""The label of positions that count nowhere: `torch.nn.functional.cross_entropy`'s default."""


def micro_batches(
    windows: TokenWindows,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    vocab_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens_BT, labels_BT), int64, without end, from the sample after `consumed_samples`.

    All ranks and accumulation steps of one global batch together read exactly the samples [c, c + global
    batch), c those consumed before it, whatever the micro batch and the data-parallel size. With
    `vocab_size` each batch is checked.

    Raises:
        DataError: a token id lies outside the vocabulary.
    """
    samples_per_step = micro_batch_size * data_parallel_size
    assert global_batch_size % samples_per_step == 0, (global_batch_size, samples_per_step)
    assert 0 <= data_parallel_rank < data_parallel_size, (data_parallel_rank, data_parallel_size)
    # Global batches are whole multiples of a step, so the walk over them is one walk over steps.
    first = consumed_samples + data_parallel_rank * micro_batch_size
    while True:
        samples = np.stack([windows.sample(k) for k in range(first, first + micro_batch_size)])
        if vocab_size is not None:
            windows.dataset.check_vocabulary(samples, vocab_size)
        yield _tokens_and_labels(samples)
        first += samples_per_step


def evaluation_batches(
    windows: TokenWindows,
    micro_batch_size: int,
    count: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    vocab_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (tokens_BT, labels_BT), int64, that cover the first `count` windows (or all, if fewer) once.

    The windows are the same whatever the micro batch and the data-parallel size, and every rank gets the
    same number of batches, because a forward pass may be collective. Rows that fill up the last step
    repeat the last window with all labels `IGNORED_LABEL`: weigh by the labels that are not.

    Raises:
        DataError: a token id lies outside the vocabulary.
    """
    assert 0 <= data_parallel_rank < data_parallel_size, (data_parallel_rank, data_parallel_size)
    last = min(count, windows.window_count) - 1
    for step_first in range(0, last + 1, micro_batch_size * data_parallel_size):
        first = step_first + data_parallel_rank * micro_batch_size
        rows = np.arange(first, first + micro_batch_size)
        samples = np.stack([windows.sample(min(int(k), last)) for k in rows])
        if vocab_size is not None:
            windows.dataset.check_vocabulary(samples, vocab_size)
        tokens_BT, labels_BT = _tokens_and_labels(samples)
        labels_BT[torch.from_numpy(rows > last)] = IGNORED_LABEL
        yield tokens_BT, labels_BT


def _tokens_and_labels(samples: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Split [B, T + 1] into what is read and what is to be predicted."""
    both = torch.from_numpy(samples)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()

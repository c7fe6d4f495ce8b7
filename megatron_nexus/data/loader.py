"""Batches of samples for one data-parallel rank, as a function of the samples consumed so far.

B micro batch, T sequence length. Every rank computes its own share: nothing is sent, nothing is kept.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_nexus.data.blend import Blend
from megatron_nexus.data.samples import TokenWindows


def micro_batches(
    samples: Blend | TokenWindows,
    consumed_samples: int,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    packed: bool = False,
) -> Iterator[tuple[Tensor | tuple[Tensor, Tensor], Tensor]]:
    """Yield (tokens_BT, labels_BT), int64, without end, from the sample after `consumed_samples`.

    If `packed`, ((tokens_BT, positions_BT), labels_BT): each token's place in its document, from 0.

    All ranks and accumulation steps of one global batch together read exactly the samples [c, c + global
    batch), c those consumed before it, whatever the micro batch and the data-parallel size.
    """
    samples_per_step = micro_batch_size * data_parallel_size
    assert global_batch_size % samples_per_step == 0, (global_batch_size, samples_per_step)
    assert 0 <= data_parallel_rank < data_parallel_size, (data_parallel_rank, data_parallel_size)
    # Global batches are whole multiples of a step, so the walk over them is one walk over steps.
    first = consumed_samples + data_parallel_rank * micro_batch_size
    while True:
        numbers = range(first, first + micro_batch_size)
        read = torch.from_numpy(np.stack([samples.sample(k) for k in numbers]))  # [B, T + 1]
        tokens_BT, labels_BT = read[:, :-1].contiguous(), read[:, 1:].contiguous()
        if packed:
            positions_BT = torch.from_numpy(np.stack([samples.positions(k) for k in numbers]))
            yield (tokens_BT, positions_BT), labels_BT
        else:
            yield tokens_BT, labels_BT
        first += samples_per_step

"""The micro-batches of this rank, as a run's configuration cuts its samples."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.blend import Blend
from megatron_nexus.data.loader import micro_batch, sample_numbers
from megatron_nexus.data.prefetcher import Prefetcher
from megatron_nexus.models.packing import Stream
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.unlearning_loss import AnswerTargets

Batch = tuple[Stream, Tensor | AnswerTargets]
"""Token ids [B, T], with positions [B, T] where samples are packed; labels [B, T], or those of answers."""


def map_batch(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch of what `function` makes of each tensor."""
    stream, targets = batch
    made = targets.map(function) if isinstance(targets, AnswerTargets) else function(targets)
    if isinstance(stream, tuple):
        return (function(stream[0]), function(stream[1])), made
    return function(stream), made


def rank_batches(
    config: RunConfig, mesh: Mesh, samples: Blend | AnswerBatches, consumed_samples: int
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of `samples`, after the first `consumed_samples`."""
    training, data = config.training, config.data
    sizes = training.micro_batch_size, training.global_batch_size
    numbers = sample_numbers(consumed_samples, *sizes, mesh.dp_rank, mesh.dp_size)
    if isinstance(samples, AnswerBatches):
        return map(samples.micro_batch, numbers)
    packed = data.reset_position_ids or data.reset_attention_mask
    return map(partial(micro_batch, samples, packed=packed), numbers)


def prefetched_batches(
    config: RunConfig, mesh: Mesh, samples: Blend | AnswerBatches, consumed_samples: int
) -> Prefetcher[Batch]:
    """Return the batches of `rank_batches`, which a thread reads ahead: for a GPU into pinned memory."""
    batches = rank_batches(config, mesh, samples, consumed_samples)
    if mesh.device.type != "cuda":
        return Prefetcher(batches)
    # Or the thread would pin them for the first GPU of the machine, and take memory there.
    begin = partial(torch.cuda.set_device, mesh.device)
    return Prefetcher((map_batch(batch, Tensor.pin_memory) for batch in batches), begin=begin)

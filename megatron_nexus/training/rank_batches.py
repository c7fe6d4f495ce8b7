"""The micro-batches of this rank, as a run's configuration cuts its samples."""

from collections.abc import Iterator

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.blend import Blend
from megatron_nexus.data.loader import micro_batches, sample_numbers
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.engine import Batch


def rank_batches(
    config: RunConfig, mesh: Mesh, samples: Blend | AnswerBatches, consumed_samples: int
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of `samples`, after the first `consumed_samples`."""
    training, data = config.training, config.data
    sizes = (training.micro_batch_size, training.global_batch_size)
    ranks = (mesh.dp_rank, mesh.dp_size)
    if isinstance(samples, AnswerBatches):
        return map(samples.micro_batch, sample_numbers(consumed_samples, *sizes, *ranks))
    packed = data.reset_position_ids or data.reset_attention_mask
    return micro_batches(samples, consumed_samples, *sizes, *ranks, packed=packed)

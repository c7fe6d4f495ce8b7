"""Proof that a growth kept the function: logits before and after, in float64, of the model's own layers.

Both models run side by side, one layer of each in memory at a time, on the same random tokens. Weights
are read from the checkpoints as they lie on the disk.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_nexus.checkpoint.full_tensors import read_full_tensor
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.growth.plan import GrowthPlan
from megatron_nexus.log import Progress
from megatron_nexus.models.decoder import DecoderStage
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard

TOLERANCE = 1e-12
"""Tolerance of logits, relative to the largest above one: rounding of longer sums in float64."""
SAMPLES, TOKENS = 2, 64


@dataclass(frozen=True)
class Comparison:
    """How far the logits of old tokens moved, their largest value, and what new tokens add to the loss."""

    largest_error: float
    largest_logit: float
    loss_shift: float
    """Mean growth of log sum exp, nats per token: 0 where the vocabulary stays."""

    @property
    def holds(self) -> bool:
        """Whether the function is the same."""
        return self.largest_error <= TOLERANCE * max(1.0, self.largest_logit)


def compare(plan: GrowthPlan, source: Location, made: Path, seed: int = 0) -> Comparison:
    """Run the model of both checkpoints on the same tokens. Raises CheckpointError."""
    old, new = plan.before.model, plan.after.model
    generator = torch.Generator().manual_seed(seed)
    length = min(TOKENS, plan.after.training.seq_length)
    tokens = torch.randint(0, old.vocab_size, (SAMPLES, length), generator=generator)
    layers = old.num_layers + new.num_layers + 4
    with (
        Progress("comparing logits before and after in float64", layers, "layers") as progress,
        torch.no_grad(),
    ):
        before = layerwise_logits(old, CheckpointReader(source), tokens, torch.float64, progress)
        after = layerwise_logits(new, CheckpointReader(made), tokens, torch.float64, progress)
    error = (after[..., : old.vocab_size] - before).abs().max()
    shift = (after.logsumexp(-1) - before.logsumexp(-1)).mean()
    return Comparison(float(error), float(before.abs().max()), float(shift))


def layerwise_logits(
    model: ModelConfig,
    reader: CheckpointReader,
    tokens: Tensor,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> Tensor:
    """Return a checkpoint's logits [T, B, vocabulary] for tokens [B, T], one layer in memory at a time."""
    x = tokens
    context = LayerContext(TensorParallel(None), Shard(0, 1), seed=None, dtype=dtype)
    for index in range(model.num_layers + 2):
        stage = DecoderStage(model, range(index, index + 1), context)  # one layer, without values
        for name, (_, parameter) in logical_parameters(stage).items():
            read_full_tensor(reader, name, parameter)
        x = stage(x)
        if progress is not None:
            progress.advance(1)
    return x

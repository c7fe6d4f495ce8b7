"""A decoder in one process, its weights from a checkpoint of any topology."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nexus.base.invocation import command
from megatron_nexus.checkpoint.full_tensors import read_full_tensor
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.models.decoder import DecoderStage, decoder_specs
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard


@dataclass(frozen=True)
class LoadedModel:
    """A whole decoder, for evaluation only, and where it lies."""

    model: ModelConfig
    decoder: DecoderStage
    device: torch.device
    seq_length: int
    """Tokens of a training sample: how far the model has learnt to look back."""
    checkpoint: Location
    """Where its weights come from."""


def load_model(
    checkpoint: Location, model: ModelConfig, seq_length: int, device: torch.device, dtype: torch.dtype
) -> LoadedModel:
    """Read the weights of a checkpoint, one after the other; memory for the model and 16 MB more.

    Raises CheckpointError: it is damaged, or holds other tensors than the model of its configuration.
    """
    reader = CheckpointReader(checkpoint)
    reader.require_tensors({name: spec.shape for name, spec in decoder_specs(model).items()})
    context = LayerContext(TensorParallel(None), Shard(0, 1), seed=None, dtype=dtype)
    decoder = DecoderStage(model, range(model.num_layers + 2), context).requires_grad_(False).eval()
    for name, (_, parameter) in logical_parameters(decoder).items():
        read_full_tensor(reader, name, parameter)
    return LoadedModel(model, decoder.to(device), device, seq_length, checkpoint)


def require_finite(values: Tensor, loaded: LoadedModel) -> Tensor:
    """Return `values`. Raises CheckpointError where one is NaN or infinite."""
    if not values.isfinite().all():
        raise CheckpointError(
            f"{loaded.checkpoint}: what the model computes is not finite (NaN or infinity): "
            f"{command('inspect')} --verify names tensors that hold such values; compute with "
            "--precision fp32, or load an earlier checkpoint"
        )
    return values


def choose_device(name: str) -> torch.device:
    """Return the device `cpu` or `cuda`; "" means an accelerator where there is one.

    Raises ConfigError where CUDA is asked for and not to be had.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here: use --device cpu")
    return torch.device(name or ("cuda" if has_cuda else "cpu"))

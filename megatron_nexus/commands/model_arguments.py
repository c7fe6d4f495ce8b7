"""A trained model for a tool: the flags that name a checkpoint and how it is run, and what they open."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.manifest import Manifest, read_manifest
from megatron_nexus.checkpoint.run_folder import find_checkpoint
from megatron_nexus.command import saved_config
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.errors import DataError
from megatron_nexus.log import Progress, logger
from megatron_nexus.spec.cost import parameter_count

if TYPE_CHECKING:
    from megatron_nexus.evaluation.loaded_model import LoadedModel


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint, what it says of itself, its tokenizer and its decoder."""

    checkpoint: Location
    manifest: Manifest
    config: RunConfig
    precision: str
    tokenizer: Tokenizer
    loaded: "LoadedModel"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--load, --tokenizer-model, --precision, --device."""
    parser.add_argument(
        "--load", required=True, metavar="RUN", help="a run's folder or one checkpoint in it; s3:// too"
    )
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        metavar="FILE",
        help="where the tokenizer of the checkpoint is now (default: where the training run had it)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of weights and activations (default: as it was trained)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to compute (default: cuda where there is one)"
    )


def open_model(given: argparse.Namespace) -> OpenedModel:
    """What the flags name; wrong ones are answered before torch is imported.

    Raises:
        CheckpointError, ConfigError, DataError: there is no such checkpoint, device or tokenizer.
    """
    checkpoint = find_checkpoint(location(given.load))
    manifest = read_manifest(checkpoint)
    config = saved_config(checkpoint, manifest)
    tokenizer = find_tokenizer(config, manifest.tokenizer_fingerprint, given.tokenizer_model)
    if tokenizer is None:
        raise DataError(
            f"{checkpoint} was trained on token files without a tokenizer: name theirs with --tokenizer-model"
        )
    precision = given.precision or config.training.precision
    with Progress(f"loading {checkpoint}"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from megatron_nexus.evaluation.loaded_model import DTYPES, choose_device, load_model

        device = choose_device(given.device or "")
        loaded = load_model(checkpoint, config.model, config.training.seq_length, device, DTYPES[precision])
    logger.info(
        "%s: %s parameters, step %s, %s on %s",
        config.preset,
        f"{parameter_count(manifest.specs.values()):,}",
        f"{manifest.progress.step:,}",
        precision,
        device,
    )
    return OpenedModel(checkpoint, manifest, config, precision, tokenizer, loaded)

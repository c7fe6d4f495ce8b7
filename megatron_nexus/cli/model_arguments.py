"""A trained model for a tool: the flags that name a checkpoint and how it is run, and what they open."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.saved_run import SavedRun, open_saved_run
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.errors import DataError
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.log import Progress, logger
from megatron_nexus.spec.cost import parameter_count

if TYPE_CHECKING:
    from megatron_nexus.evaluation.loaded_model import LoadedModel


@dataclass(frozen=True)
class TrainedModel(SavedRun):
    """A checkpoint with its tokenizer, and how its model is to be run."""

    tokenizer: Tokenizer
    precision: str
    device: str
    """"" takes an accelerator where there is one."""

    def load(self) -> "LoadedModel":
        """Load the decoder; imports torch. Raises ConfigError where the device is not available."""
        with Progress(f"loading {self.checkpoint}"):
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            from megatron_nexus.evaluation.loaded_model import choose_device, load_model
            from megatron_nexus.models.layer_context import DTYPES

            device, length = choose_device(self.device), self.config.training.seq_length
            loaded = load_model(self.checkpoint, self.config.model, length, device, DTYPES[self.precision])
        logger.info(
            "%s: %s parameters, step %s, %s on %s",
            self.config.preset,
            f"{parameter_count(self.manifest.specs.values()):,}",
            f"{self.manifest.progress.step:,}",
            self.precision,
            device,
        )
        return loaded


def add_checkpoint_arguments(parser: FlagParser) -> None:
    """Add the flags --load and --tokenizer-model."""
    flag = parser.add_flag
    flag("--load", "a run's folder or one checkpoint in it; s3:// too", required=True, metavar="RUN")
    text = "where the tokenizer of the checkpoint is now (default: where the training run had it)"
    flag("--tokenizer-model", text, type=Path, metavar="FILE")


def add_model_arguments(parser: FlagParser) -> None:
    """Add the flags --load, --tokenizer-model, --precision and --device."""
    add_checkpoint_arguments(parser)
    flag = parser.add_flag
    flag("--precision", "of weights and activations (default: as it was trained)", choices=("fp32", "bf16"))
    flag("--device", "where to compute (default: cuda where there is one)", choices=("cpu", "cuda"))


def find_model(given: argparse.Namespace) -> TrainedModel:
    """Return the model that the flags name; no weights are read.

    Raises CheckpointError, DataError: there is no such checkpoint or tokenizer.
    """
    saved = open_saved_run(location(given.load))
    tokenizer = find_tokenizer(saved.config, tokenizer_record(saved.manifest), given.tokenizer_model)
    if tokenizer is None:
        raise DataError(
            f"{saved.checkpoint} was trained on token files without a tokenizer: name theirs with "
            "--tokenizer-model"
        )
    precision = given.precision or saved.config.training.precision
    return TrainedModel(**vars(saved), tokenizer=tokenizer, precision=precision, device=given.device or "")

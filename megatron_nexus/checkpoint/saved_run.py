"""A saved run: a checkpoint, its manifest, and the configuration of the run that wrote it."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import Manifest, read_manifest
from megatron_nexus.checkpoint.run_dir import TOKENIZER_FOLDER, find_checkpoint
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint, its manifest, and the configuration of the run that wrote it."""

    checkpoint: Location
    manifest: Manifest
    config: RunConfig


def open_saved_run(place: Location) -> SavedRun:
    """Return the newest checkpoint of a run's folder, or the one checkpoint that `place` is.

    Raises CheckpointError.
    """
    checkpoint = find_checkpoint(place)
    manifest = read_manifest(checkpoint)
    return SavedRun(checkpoint, manifest, saved_config(checkpoint, manifest))


def saved_config(checkpoint: Location, manifest: Manifest) -> RunConfig:
    """Return the configuration that a checkpoint was trained with.

    Raises CheckpointError where this version cannot read it.
    """
    try:
        config = RunConfig.from_dict(manifest.config)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: its configuration is not one of this version ({error}): load it with the version "
            "that wrote it"
        ) from error
    named = Path(config.data.tokenizer_model)
    moved = checkpoint.parent / TOKENIZER_FOLDER
    if named.name == TOKENIZER_FOLDER and not named.exists() and moved.is_dir():
        # Imported with the model, it lies next to the checkpoint wherever both are now.
        config = replace(config, data=replace(config.data, tokenizer_model=str(moved)))
    return config

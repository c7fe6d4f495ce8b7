"""Export: a checkpoint becomes a folder that transformers loads, written chunk by chunk in bounded memory.

    README.md (the model card)
    config.json  generation_config.json  model.safetensors, or several and their index
    tokenizer.json  tokenizer_config.json            where the tokenizer is known
    configuration_nexusformer.py  modeling_nexusformer.py      where transformers has no class of its own

The folder gets its name when it is complete: an interrupted export leaves nothing.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nexus.checkpoint.chunks import full_box, split_box
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.checkpoint.non_finite import NonFiniteValues
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.interchange.architecture import Architecture, JsonObject, architecture_of, config_json
from megatron_nexus.interchange.model_card import CARD_FILE, write_model_card
from megatron_nexus.interchange.names import huggingface_name
from megatron_nexus.interchange.output_dir import output_dir
from megatron_nexus.interchange.safetensors_writer import (
    BLOCK_ELEMENTS,
    Precision,
    plain_bytes,
    write_safetensors,
)
from megatron_nexus.interchange.tokenizer_files import write_json, write_tokenizer
from megatron_nexus.log import Progress
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.param import ParamSpec

DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Exported:
    """What was made: the class that loads it, its weight files, what became of the tokenizer, and whether
    the head is the embedding.
    """

    architecture: Architecture
    files: tuple[str, ...]
    tokenizer: str
    tied: bool


def export_checkpoint(
    source: Location,
    target: Path,
    config: RunConfig,
    tokenizer: Tokenizer | None,
    precision: Precision,
    shard_bytes: int,
    allow_non_finite: bool = False,
) -> Exported:
    """Write the checkpoint `source` of a run that was configured so as the folder `target`.

    `precision` is that of the weights, of which a file has at most `shard_bytes`. The source is only read.
    NaN and infinity are refused, or counted in a warning with `allow_non_finite`.

    Raises ConfigError: `target` exists; CheckpointError: the checkpoint is damaged, or the folder cannot be
    written; DataError: the tokenizer cannot be exported.
    """
    model, length = config.model, config.training.seq_length
    reader = CheckpointReader(source)
    architecture = architecture_of(model, imported_as(reader.manifest))
    specs = decoder_specs(model)
    reader.require_tensors({name: spec.shape for name, spec in specs.items()})
    tied = not architecture.files and _is_tied(reader)
    if tied:
        del specs["head.weight"]
    needed = plain_bytes(specs, precision)
    begin_token, end_token = (tokenizer.bos_id, tokenizer.eod_id) if tokenizer is not None else (None, None)
    shards = _shards(specs, precision, shard_bytes)
    count = len(shards)
    names = tuple(f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
    names = names if count > 1 else ("model.safetensors",)
    non_finite = NonFiniteValues()
    with output_dir(target, needed) as folder:
        record = config_json(model, architecture, length, DTYPES[precision], end_token, tied, begin_token)
        write_json(folder / "config.json", record)
        ends: JsonObject = {"bos_token_id": begin_token, "eos_token_id": end_token, "pad_token_id": end_token}
        write_json(folder / "generation_config.json", ends)
        card, dtype = folder / CARD_FILE, DTYPES[precision]
        write_model_card(card, config, reader.manifest, architecture, dtype, tokenizer is not None)
        for path in architecture.files:
            shutil.copyfile(path, folder / path.name)
        described = write_tokenizer(tokenizer, folder, length) if tokenizer is not None else ""
        with Progress("writing weights", needed, "MB") as progress:
            for name, shard in zip(names, shards, strict=True):
                write_safetensors(
                    folder / name, reader, "fp32", precision, shard, {}, progress.advance, non_finite
                )
        non_finite.refuse(source, allow_non_finite)
        if len(shards) > 1:
            places = {
                held: name for name, shard in zip(names, shards, strict=True) for held in shard.values()
            }
            index: JsonObject = {"metadata": {"total_size": needed}, "weight_map": places}
            write_json(folder / "model.safetensors.index.json", index)
    return Exported(architecture, names, described, tied)


def imported_as(manifest: Manifest) -> str:
    """Return the model_type that a checkpoint's model was imported as, "" where it was not imported."""
    return next((str(entry["model_type"]) for entry in manifest.lineage if "model_type" in entry), "")


def _is_tied(reader: CheckpointReader) -> bool:
    """Return whether the head still equals the embedding: a tied model is imported with two copies."""
    shape = reader.manifest.specs["head.weight"].shape
    return all(
        np.array_equal(
            reader.read_box("head.weight", "fp32", box), reader.read_box("embedding.weight", "fp32", box)
        )
        for box in split_box(full_box(shape), BLOCK_ELEMENTS)
    )


def _shards(specs: Mapping[str, ParamSpec], precision: Precision, most_bytes: int) -> list[dict[str, str]]:
    """Yield the tensors of each file by both names: at most `most_bytes`, or one larger tensor alone."""
    shards: list[dict[str, str]] = []
    held = 0
    for name, spec in specs.items():
        size = plain_bytes({name: spec}, precision)
        if not shards or held + size > most_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = huggingface_name(name)
        held += size
    return shards

"""Import: a model of others becomes a checkpoint of a run that has not taken a step.

Weights are read and written a chunk at a time, moments are zero: memory is needed for one chunk. The run's
folder gets its name when it is complete: an interrupted import leaves nothing.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.checkpoint.chunks import full_box, split_box
from megatron_nexus.checkpoint.data_file import (
    STATES,
    Array,
    Chunk,
    FilePart,
    chunk_starts,
    safetensors_header,
    write_chunks,
)
from megatron_nexus.checkpoint.manifest import (
    EngineRecord,
    Manifest,
    OptimizerRecord,
    RunProgress,
    Topology,
)
from megatron_nexus.checkpoint.new_checkpoint import new_checkpoint
from megatron_nexus.checkpoint.non_finite import NonFiniteValues
from megatron_nexus.checkpoint.run_dir import TOKENIZER_FOLDER, checkpoint_name
from megatron_nexus.config.optimizer_groups import DECAY, NO_DECAY, group_settings
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.tokenizer import open_tokenizer
from megatron_nexus.errors import CheckpointError, DataError
from megatron_nexus.interchange.hf_config import ties_head
from megatron_nexus.interchange.names import ENDS, huggingface_name
from megatron_nexus.interchange.output_dir import output_dir
from megatron_nexus.interchange.source_model import SourceModel
from megatron_nexus.log import Progress
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.param import ParamSpec

CHUNK_ELEMENTS = 1 << 22
EMBEDDING, HEAD = ENDS["embedding.weight"], ENDS["head.weight"]
SHOWN = 10


def import_checkpoint(
    source: SourceModel, origin: Path, root: Path, config: RunConfig, allow_non_finite: bool = False
) -> Path:
    """Write the weights of `source`, which lies at `origin`, as the only checkpoint of the run `root`.

    `config` is what the run is configured as. The source is only read. Returns the checkpoint's folder.
    NaN and infinity are refused, or counted in a warning with `allow_non_finite`.

    Raises:
        ConfigError: `root` holds files.
        CheckpointError: a tensor is missing, of another shape, unknown or not finite, or something cannot be
            read or written; nothing is left behind.
        DataError: the tokenizer is none, or has more tokens than the model.
    """
    specs = decoder_specs(config.model)
    places = _places(source, specs)
    chunks = [
        Chunk(name, state, box)
        for name, spec in specs.items()
        for state in STATES
        for box in split_box(full_box(spec.shape), CHUNK_ELEMENTS)
    ]
    needed = chunk_starts(safetensors_header(chunks), chunks)[-1]
    non_finite = NonFiniteValues()
    with (
        output_dir(root, needed) as folder,
        Progress("writing weights and zero moments", needed, "MB") as progress,
    ):
        fingerprint = ""
        if source.write_tokenizer is not None:
            kept = folder / TOKENIZER_FOLDER
            kept.mkdir()
            source.write_tokenizer(kept)
            tokenizer = open_tokenizer(kept)
            if tokenizer.vocab_size > config.model.vocab_size:
                raise DataError(
                    f"the tokenizer of {origin} has {tokenizer.vocab_size} tokens, the model "
                    f"{config.model.vocab_size}: they do not belong together; import without it: "
                    "--no-tokenizer"
                )
            fingerprint = tokenizer.fingerprint
            # Absolute: the run may be continued from any working directory.
            place = str(root.resolve() / TOKENIZER_FOLDER)
            data = dataclasses.replace(config.data, tokenizer_model=place)
            config = dataclasses.replace(config, data=data)
        with new_checkpoint(folder, 0, SingleProcess()) as checkpoint:
            values = _values(source, places, chunks, progress, non_finite)
            record = write_chunks(checkpoint.folder, [FilePart(0, chunks)], values)
            non_finite.refuse(origin, allow_non_finite)
            checkpoint.finish(_manifest(source, origin, specs, config, fingerprint), [record])
    return root / checkpoint_name(0)


def _places(source: SourceModel, specs: dict[str, ParamSpec]) -> dict[str, str]:
    """Return each parameter's name in the files. Raises CheckpointError where they hold another model."""
    shapes = source.weights.shapes
    places = {name: huggingface_name(name) for name in specs}
    # Files of tied models may leave the head out.
    if ties_head(source.config):
        places["head.weight"] = EMBEDDING
    problems = [
        f"{place}: {_shape(shapes.get(place))} in the files, {_shape(specs[name].shape)} in the model"
        for name, place in places.items()
        if shapes.get(place) != specs[name].shape
    ]
    # Old files of Llama hold the rotary frequencies, which follow from the configuration.
    known = {*places.values(), HEAD}
    problems += [
        f"{place}: in the files, not in the model"
        for place in shapes
        if place not in known and not place.endswith("rotary_emb.inv_freq")
    ]
    if problems:
        shown = problems[:SHOWN] + ([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
        raise CheckpointError(
            f"{source.name} does not hold the model that its configuration describes: {'; '.join(shown)}"
        )
    return places


def _shape(shape: tuple[int, ...] | None) -> str:
    return " x ".join(map(str, shape)) if shape is not None else "nothing"


def _values(
    source: SourceModel,
    places: dict[str, str],
    chunks: list[Chunk],
    progress: Progress,
    non_finite: NonFiniteValues,
) -> Iterator[Array]:
    """Yield the values of all chunks, one at a time, and count those that are not finite."""
    for chunk in chunks:
        box = chunk.box  # whole rows: none is as long as a chunk
        if chunk.state == "fp32":
            first = box.offsets[0]
            values = source.weights.read_rows(places[chunk.tensor], first, first + box.sizes[0])
            non_finite.add(places[chunk.tensor], values)
            yield values
        else:
            yield np.zeros(box.sizes, np.float32)
        progress.advance(box.numel * 4)


def _manifest(
    source: SourceModel, origin: Path, specs: dict[str, ParamSpec], config: RunConfig, fingerprint: str
) -> Manifest:
    groups = {
        name: {"lr": config.optimizer.lr, **group_settings(config.optimizer, name)}
        for name in (DECAY, NO_DECAY)
    }
    entry = {
        "imported": str(origin.resolve()),
        "format": source.format,
        "model_type": str(source.config["model_type"]),
        "head": "a copy of the embedding" if ties_head(source.config) else "its own",
    }
    return Manifest(
        progress=RunProgress(step=0, samples=0, tokens=0, flops=0),
        specs=specs,
        optimizer=OptimizerRecord(0, groups),
        engine=EngineRecord(0, 0, 0),
        topology=Topology(1, 1, 1, 1),
        config=dataclasses.asdict(config),
        tokenizer_fingerprint=fingerprint,
        lineage=[entry],
    )

"""The verb `inspect`: show what a checkpoint holds, and check every byte of it."""

import json

from megatron_nexus import log
from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.checkpoint.run_dir import checkpoint_name, latest_step
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.checkpoint.storage import folder_of
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import training_sources
from megatron_nexus.errors import CheckpointError
from megatron_nexus.growth.request import GROWING
from megatron_nexus.spec.cost import parameter_count


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser("inspect", "CHECKPOINT [flags]", description="Show and check a checkpoint.")
    flag = parser.add_flag
    flag("checkpoint", "a run's folder, or one checkpoint in it", type=location)
    flag("--tensors", "list every tensor with its logical shape", action="store_true")
    flag("--verify", "read every byte and check it", action="store_true")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus inspect` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    saved = open_saved_run(given.checkpoint)
    folder, manifest = saved.checkpoint, saved.manifest
    reader = CheckpointReader(folder)
    sizes = folder_of(folder).sizes()
    total_bytes = sum(sizes.values())
    lines = {
        "checkpoint": f"{folder}, format version {manifest.format_version}",
        **describe(manifest, saved.config),
        "files": f"{len(sizes):,}, {total_bytes:,} bytes, {reader.chunk_count:,} chunks",
    }
    for name, text in lines.items():
        log.logger.info("%-12s %s", name, text)
    for entry in manifest.lineage:
        log.logger.info("%-12s %s", "lineage", json.dumps(entry))
    if given.tensors:
        for spec in manifest.specs.values():
            axes = " x ".join(f"{axis.name} {axis.size:,}" for axis in spec.axes)
            log.logger.info("%s  %s", spec.name, axes)
    if given.verify:
        with log.Progress("Reading every chunk", total_bytes, "MB") as progress:
            non_finite = reader.verify(progress.advance)
        log.logger.info("No damage found in %s: %s bytes", folder.name, f"{total_bytes:,}")
        if non_finite.counts:
            raise CheckpointError(
                f"{folder}: {non_finite}: they were saved so, and what is computed with them is not finite: "
                "load an earlier checkpoint"
            )
        latest = latest_step(given.checkpoint)
        if latest is not None and latest != manifest.progress.step:
            raise CheckpointError(
                f"{given.checkpoint}: {checkpoint_name(latest)}, which `latest` names, is damaged (see "
                f"above): copy it again, or let runs continue from {folder.name}, which is whole"
            )


def describe(manifest: Manifest, config: RunConfig) -> dict[str, str]:
    """Return what a manifest holds, as lines by topic."""
    done, ranks, model = manifest.progress, manifest.topology, config.model
    grown_regions = len(manifest.optimizer.grown_regions)
    groups = ", ".join(
        f"{name} (lr {group['lr']:.3g}, weight decay {group['weight_decay']:g})"
        for name, group in manifest.optimizer.groups.items()
    )
    # What the layers compute, where it is not the default.
    others = [
        f"{name} {value}"
        for name, value in vars(model).items()
        if name not in GROWING and value != getattr(type(model), name)
    ]
    built_in = "of its corpora" if training_sources(config.data) else "of the built-in corpus"
    tokenizer, place = manifest.tokenizer_fingerprint[:12], config.data.tokenizer_model or built_in
    return {
        "progress": f"step {done.step:,}: {done.samples:,} samples, {done.tokens:,} tokens, "
        f"{done.flops:.3g} FLOPs",
        "model": f"{config.preset}: {parameter_count(manifest.specs.values()):,} parameters in "
        f"{len(manifest.specs)} tensors",
        "sizes": ", ".join(f"{name} {vars(model)[name]:,}" for name in GROWING if vars(model)[name]),
        "layers": ", ".join(others) or "as by default",
        "written by": f"{ranks.world_size} rank{'s' if ranks.world_size > 1 else ''}: tensor "
        f"{ranks.tensor_size} x pipeline {ranks.pipe_size} x data {ranks.data_size}, "
        f"ZeRO {max(1, config.parallel.zero_stage)}, {config.training.precision}",
        "optimizer": f"{manifest.optimizer.step_count:,} steps of AdamW; {groups}"
        + (f"; {grown_regions} newly grown regions with their own Adam step count" if grown_regions else ""),
        "data": f"{manifest.data.description or 'unknown'}, from sample {manifest.data.first_sample:,} on",
        "tokenizer": f"{place}, sha256 {tokenizer} ..." if tokenizer else "none",
    }

"""What a run takes over from the checkpoint that it continues, besides the engine's tensors."""

import dataclasses
from collections.abc import Sequence

from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import DataRecord, EngineRecord, GrownRegion, JsonObject, Manifest
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.growth.generations import newest_regions
from megatron_nexus.log import logger
from megatron_nexus.training.corpus import data_changes
from megatron_nexus.training.grown_adam import install_bias_correction, needing_correction
from megatron_nexus.training.new_lr import continue_new_lr
from megatron_nexus.training.zero_state import ZeroState


def continue_optimizer(state: ZeroState, manifest: Manifest, config: RunConfig) -> Sequence[GrownRegion]:
    """Keep the loaded moments, or reset them; return the regions with an Adam step count of their own."""
    optimizer, count = config.optimizer, manifest.optimizer.step_count
    regions: Sequence[GrownRegion] = ()
    if config.checkpoint.reset_optimizer:
        state.forget_moments()
        logger.info("optimizer state reset (moments and step count are zero)")
    else:
        betas = (optimizer.adam_beta1, optimizer.adam_beta2)
        regions = needing_correction(manifest.optimizer.grown_regions, count, betas)
        install_bias_correction(state, regions)
        if regions:
            logger.info("newly grown weights use their own Adam step count for bias correction")
    if optimizer.has_new_lr:
        newest = newest_regions(config.model, manifest)
        logger.info("%s", continue_new_lr(state, newest, count, optimizer))
    return regions


def continued_data(data: DataRecord, manifest: Manifest, config: RunConfig) -> DataRecord:
    """Return where the samples of a run go on: `data` from its first sample, where it is other data."""
    if manifest.data.fingerprint in ("", data.fingerprint):
        first_sample = manifest.data.first_sample
    else:
        first_sample = manifest.progress.samples
        changes = data_changes(manifest.config, config, data.description, manifest.data.description)
        logger.info(
            f"the training data differs from the checkpoint's ({'; '.join(changes)}): it is read from its "
            f"first sample, and none of the {manifest.progress.tokens:,} tokens that the run has read is "
            "left out"
        )
    left_out = manifest.data.left_out if manifest.data.fingerprint == data.fingerprint else ()
    return dataclasses.replace(data, first_sample=first_sample, left_out=left_out)


def rewound_data(data: DataRecord, manifest: Manifest, left_out: tuple[int, int]) -> DataRecord:
    """Return where the samples of a run go on at a checkpoint of its own, without those `left_out`."""
    same = manifest.data.fingerprint in ("", data.fingerprint)
    first_sample = manifest.data.first_sample if same else manifest.progress.samples
    return dataclasses.replace(data, first_sample=first_sample, left_out=(*data.left_out, left_out))


def begin_unlearning(
    state: ZeroState, checkpoint: Location, manifest: Manifest, config: RunConfig, data: DataRecord
) -> Sequence[JsonObject]:
    """Begin at iteration 0 with the loaded weights; return the lineage, which says where they come from."""
    state.forget_moments()
    state.counters = EngineRecord(0, 0, 0)
    origin: JsonObject = {
        "unlearning": dataclasses.asdict(config.unlearning),
        "samples": data.description,
        "parent": str(checkpoint.resolve()),
        "parent_step": manifest.progress.step,
    }
    return [*manifest.lineage, origin]

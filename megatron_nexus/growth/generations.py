"""Which growth added which part of a tensor: the growths of a checkpoint's lineage, repeated on boxes.

The manifest's `grown_regions` end when Adam's correction is no longer visible; the lineage stays.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron_nexus.checkpoint.chunks import full_box, intersect
from megatron_nexus.checkpoint.manifest import GrownRegion, JsonObject, Manifest
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.growth.plan import plan_tensors, translate
from megatron_nexus.growth.request import model_before
from megatron_nexus.growth.settings import GrowthConfig, recorded_settings
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.shard import Box

AddedBox = tuple[Box, int]
"""A part of a tensor, and the number of the growth that added it; 0: there from the beginning."""


def growths_of(lineage: Sequence[JsonObject]) -> list[Mapping[str, Any]]:
    """Return the entries of a lineage that enlarged the model, oldest first."""
    return [entry for entry in lineage if "generation" in entry and "axes" in entry]


def boxes_by_growth(model: ModelConfig, lineage: Sequence[JsonObject]) -> dict[str, list[AddedBox]]:
    """Return the parts of each tensor of a checkpoint's `model`, which has grown as `lineage` says."""
    growths = growths_of(lineage)
    models = [model]
    for entry in reversed(growths):
        models.insert(0, model_before(models[0], entry["axes"]))
    first = decoder_specs(models[0])
    boxes = {name: [(full_box(spec.shape), 0)] for name, spec in first.items() if spec.numel}
    for number, (entry, (old, new)) in enumerate(zip(growths, pairwise(models), strict=True), start=1):
        # Which parts are new does not depend on what fills them, but for the place of a stack.
        recorded = {"depth_placement": "interleaved", **recorded_settings(entry)}
        settings = GrowthConfig(**{**recorded, "init": "zero"})
        grown: dict[str, list[AddedBox]] = {}
        for name, tensor in plan_tensors(old, new, settings).items():
            grown[name] = []
            for filled in tensor.boxes:
                if filled.is_new or filled.old is None or tensor.old is None:
                    grown[name].append((filled.box, number))
                    continue
                for box, added in boxes[tensor.old.name]:
                    if shared := intersect(box, filled.old):
                        grown[name].append((translate(shared, filled.old, filled.box), added))
        boxes = grown
    return boxes


def newest_regions(model: ModelConfig, manifest: Manifest) -> list[GrownRegion]:
    """Return what the last growth of a checkpoint's `model` has added, with Adam's step count at that growth.

    Of all that is new, however long ago, copies with the moments of their source too.
    """
    growths = growths_of(manifest.lineage)
    if not growths:
        return []
    since = manifest.progress.step - growths[-1]["step"]
    return [
        GrownRegion(name, box, manifest.optimizer.step_count - since)
        for name, parts in boxes_by_growth(model, manifest.lineage).items()
        for box, number in parts
        if number == len(growths)
    ]

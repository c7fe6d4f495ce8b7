"""Which growth added which part of a tensor: the growths of a checkpoint's lineage, repeated on boxes.

The manifest's `grown_regions` end when Adam's correction is no longer visible; the lineage stays.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from megatron_nexus.checkpoint.chunks import full_box, intersect
from megatron_nexus.checkpoint.manifest import GrownRegion, JsonObject, Manifest
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.growth.plan import TensorPlan, plan_tensors, translate
from megatron_nexus.growth.request import model_before
from megatron_nexus.growth.settings import GrowthConfig, recorded_settings
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.growth_rule import Fill
from megatron_nexus.spec.shard import Box

AddedBox = tuple[Box, int]
"""A part of a tensor, and the number of the growth that added it; 0: there from the beginning."""
RowCopy = tuple[int, int, int]
"""The first of copied rows, their number, the first of the rows that they began as."""


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
        settings = GrowthConfig(**{**recorded_settings(entry), "init": "zero"})
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


def copied_rows(model: ModelConfig, lineage: Sequence[JsonObject]) -> dict[str, tuple[str, list[RowCopy]]]:
    """Return, of each matrix whose rows the latest growth copied, the tensor that they are of, and the rows.

    Units of copied layers are copies of those of the old layer, units of `split` of old ones of their tensor.
    """
    growths = growths_of(lineage)
    if not growths:
        return {}
    settings = GrowthConfig(**recorded_settings(growths[-1]))
    tensors = plan_tensors(model_before(model, growths[-1]["axes"]), model, settings)
    #: By its name before the growth: the tensor that has the old elements now.
    kept = {t.old.name: t for t in tensors.values() if t.old and not all(box.is_new for box in t.boxes)}
    found = {}
    for name, tensor in tensors.items():
        source = kept.get(tensor.old.name) if tensor.old else None
        if source and len(tensor.spec.axes) == 2 and (rows := list(_row_copies(tensor, source))):
            found[name] = source.spec.name, rows
    return found


def _row_copies(tensor: TensorPlan, source: TensorPlan) -> Iterator[RowCopy]:
    """Yield the rows of `tensor` that begin as other ones, by their first columns: of `source` or its own."""
    kept = [(box.old, box.box) for box in source.boxes if not box.is_new and box.old]
    for filled in tensor.boxes:
        if filled.fill is not Fill.COPIED or filled.old is None or filled.box.offsets[1]:
            continue
        for old, box in kept:
            if shared := intersect(filled.old, old):
                copy, row = (translate(shared, *moved) for moved in ((filled.old, filled.box), (old, box)))
                if source is not tensor or copy.offsets[0] != row.offsets[0]:
                    yield copy.offsets[0], copy.sizes[0], row.offsets[0]


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

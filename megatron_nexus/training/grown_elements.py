"""Which elements of each tensor the latest growth has added, and which units of its axes.

A matrix [out, in] has rows that are new (units that it writes) and columns that are new (units that it
reads). Elements are new where either is; `boxes` say so exactly, for tensors of any number of axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nexus.checkpoint.chunks import full_box
from megatron_nexus.checkpoint.manifest import JsonObject
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.growth.generations import RowCopy, boxes_by_growth, copied_rows
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box


@dataclass(frozen=True)
class GrownElements:
    """The parts of a tensor; each is old (False) or of the latest growth (True)."""

    spec: ParamSpec
    boxes: tuple[tuple[Box, bool], ...]
    source: str = ""
    """The matrix in which the rows lie that rows of this one began as copies of; "" without copies."""
    copies: tuple[RowCopy, ...] = ()

    def new_units(self, axis: int) -> Tensor:
        """Return which units of an axis are new [size]: those whose every element is."""
        new = torch.zeros(self.spec.shape[axis], dtype=torch.bool)
        for box, is_new in self.boxes:
            others = [offset for i, offset in enumerate(box.offsets) if i != axis]
            # Growth appends, so an old unit has old elements at the first place of all other axes.
            if is_new and not any(others):
                new[box.offsets[axis] : box.offsets[axis] + box.sizes[axis]] = True
        return new


def grown_elements(model: ModelConfig, lineage: Sequence[JsonObject]) -> dict[str, GrownElements]:
    """Return the elements of every tensor of a model with this lineage; all old where nothing has grown."""
    specs = decoder_specs(model)
    parts = boxes_by_growth(model, lineage)
    latest = max((number for boxes in parts.values() for _, number in boxes), default=0)
    copied = copied_rows(model, lineage)
    found = {}
    for name, spec in specs.items():
        boxes = parts.get(name, [(full_box(spec.shape), 0)] if spec.numel else [])
        source, rows = copied.get(name, ("", ()))
        is_new = tuple((box, 0 < number == latest) for box, number in boxes)
        found[name] = GrownElements(spec, is_new, source, tuple(rows))
    return found

"""GrownReader: a checkpoint read as the larger model, box by box; nothing is computed before it is asked for.

Resharding, growing with the tool and growing while loading are all "read boxes of this".
"""

from functools import cache
from math import prod, sqrt

import numpy as np

from megatron_nexus.checkpoint.chunks import full_box, index_within, intersect, split_box
from megatron_nexus.checkpoint.data_file import Array
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.growth.plan import (
    GrowthPlan,
    TensorPlan,
    generation,
    grown_manifest,
    takes_moments,
    translate,
)
from megatron_nexus.spec.growth_rule import Fill, FilledBox
from megatron_nexus.spec.initialise import logical_values
from megatron_nexus.spec.param import Axis, Normal, ParamSpec
from megatron_nexus.spec.shard import Box

DEVIATION_ELEMENTS = 1 << 22
"""Elements that the deviation of an old tensor is taken from at once."""


class GrownReader(StateReader):
    """Reads the checkpoint in `folder` as the model that `plan` makes of it."""

    def __init__(self, folder: Location, plan: GrowthPlan) -> None:
        """Open the checkpoint.

        Raises CheckpointError, also where its tensors are not those of its configuration.
        """
        self.folder = folder
        self._source = CheckpointReader(folder)
        self._plan = plan
        self._generation = generation(self._source.manifest)
        # A tensor without elements is stored nowhere: a Nexus-Rank of no width.
        old = [tensor.old for tensor in plan.tensors.values() if tensor.old is not None]
        self._source.require_tensors({spec.name: spec.shape for spec in old if spec.numel})
        self.manifest: Manifest = grown_manifest(self._source.manifest, plan, str(folder.resolve()))

    def random_states(self, rank: int) -> dict[str, bytes]:
        """Return the states of a rank's random generators; none if the model has grown: it is another run."""
        return {} if self._plan.axes else self._source.random_states(rank)

    def read_into(self, values: Array, tensor: str, state: str, box: Box) -> None:
        plan = self._plan.tensors[tensor]
        for filled in plan.boxes:
            overlap = intersect(filled.box, box)
            if overlap is None:
                continue
            part = values[index_within(overlap, box)]
            if filled.old is not None and (state == "fp32" or takes_moments(filled, self._plan.settings)):
                assert plan.old is not None, f"{tensor} keeps elements of nothing"
                self._source.read_into(part, plan.old.name, state, translate(overlap, filled.box, filled.old))
                self._divide(part, filled, state)
            elif filled.fill is Fill.ZERO or state != "fp32":
                part[...] = 0.0  # moments begin at zero
            else:
                part[...] = self._drawn(plan, filled, overlap)

    def _divide(self, values: Array, filled: FilledBox, state: str) -> None:
        """Leave of old values the part that a box has of them; moments follow where copies have theirs."""
        if state == "fp32":
            if filled.part == "first":
                values *= np.float32(filled.share)
            elif filled.part == "rest":
                values -= np.float32(filled.share) * values  # with the first part the old value exactly
        elif self._plan.settings.moments == "copied":
            values *= np.float32(filled.gradient ** (2 if state == "exp_avg_sq" else 1))

    def _drawn(self, plan: TensorPlan, filled: FilledBox, box: Box) -> Array:
        """Draw new values as a function of (growth seed, generation, parameter name, box, element).

        A box is drawn as a tensor of its own, so that nothing is drawn for the old elements between. Its
        name keeps its values apart from those drawn at initialization and by other growths.
        """
        spec, first = plan.spec, filled.box.offsets
        start = filled.drawn.offsets if filled.drawn else first
        init = Normal(self._deviation(plan, filled)) if isinstance(spec.init, Normal) else spec.init
        name = f"growth {self._generation} of {spec.name} at {start}"
        axes = tuple(Axis(axis.name, size) for axis, size in zip(spec.axes, filled.box.sizes, strict=True))
        drawn = ParamSpec(name, axes, init, spec.role, spec.growth_roles)
        within = Box(tuple(o - begin for o, begin in zip(box.offsets, first, strict=True)), box.sizes)
        values = logical_values(drawn, self._plan.settings.growth_seed, within)
        return -values if filled.part == "rest" else values

    def _deviation(self, plan: TensorPlan, filled: FilledBox) -> float:
        settings, init = self._plan.settings, plan.spec.init
        assert isinstance(init, Normal), f"{plan.spec.name} is not drawn"
        if filled.fill is Fill.NOISE:
            old = self._old_deviation(plan.old) if plan.old is not None and plan.old.numel else init.std
            return settings.noise_share * old
        if settings.init_std:
            # Residual writers keep their smaller share.
            return init.std * settings.init_std / self._plan.after.model.init_method_std
        return init.std

    @cache  # noqa: B019 - one reader lives as long as its growth
    def _old_deviation(self, spec: ParamSpec) -> float:
        """Return the standard deviation of an old tensor's weights, in bounded memory."""
        total = squares = 0.0
        for box in split_box(full_box(spec.shape), DEVIATION_ELEMENTS):
            values = self._source.read_box(spec.name, "fp32", box).astype(np.float64)
            total += float(values.sum())
            squares += float(np.square(values).sum())
        count = prod(spec.shape)
        return sqrt(max(0.0, squares / count - (total / count) ** 2))

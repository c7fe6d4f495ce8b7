"""The plan of a growth: for every tensor of the larger model, which old one it was and what fills it.

Pure: from the configuration of a checkpoint and what is asked for. No file is read.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from megatron_nexus.checkpoint.chunks import intersect
from megatron_nexus.checkpoint.manifest import GrownRegion, Manifest, OptimizerRecord
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.growth.request import GROWING, GrowthRequest, grown_config
from megatron_nexus.growth.settings import GrowthConfig, changes_of_function
from megatron_nexus.models.decoder import decoder_specs, layer_parts
from megatron_nexus.spec.growth_rule import FilledBox, copied_boxes, grown_boxes, inserted_boxes
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the larger model: its spec, what it was or is a copy of, its boxes.

    One that is initialised has no `old`.
    """

    spec: ParamSpec
    old: ParamSpec | None
    boxes: tuple[FilledBox, ...]


@dataclass(frozen=True)
class GrowthPlan:
    """A growth: the run's configuration before and after, how new weights begin, and every tensor."""

    before: RunConfig
    after: RunConfig
    settings: GrowthConfig
    tensors: Mapping[str, TensorPlan]

    @property
    def axes(self) -> dict[str, tuple[int, int]]:
        """The sizes that grow, by field: (before, after)."""
        old, new = vars(self.before.model), vars(self.after.model)
        return {name: (old[name], new[name]) for name in GROWING if old[name] != new[name]}

    @property
    def changes(self) -> list[str]:
        """The flags by which this growth changes the function."""
        return changes_of_function(self.settings, self.axes)


@dataclass(frozen=True)
class LayerOrigin:
    """An old layer, and whether a layer is a copy of it or the layer itself."""

    index: int
    copied: bool = False


def layer_origins(old: int, new: int, settings: GrowthConfig) -> list[LayerOrigin | None]:
    """Return, for each of `new` layers, the old layer that it was or begins as; None if it is drawn.

    Interleaved layers follow equal groups of old ones, the last at the end (LLaMA Pro, Wu et al., 2024), and
    are copies of the old one before them. Stacked ones repeat the old ones in their order (G_stack, Du et
    al., 2024); the last repetition may be cut off.
    """
    origins: list[LayerOrigin | None] = [None] * new
    for i in range(old):
        origins[i + (i * (new - old) // old if settings.placement == "interleaved" else 0)] = LayerOrigin(i)
    match settings.depth_init:
        case "copy":
            for i, origin in enumerate(origins):
                if origin is None and (before := origins[i - 1]):
                    origins[i] = LayerOrigin(before.index, copied=True)
        case "stack":
            origins[old:] = [LayerOrigin(i % old, copied=True) for i in range(old, new)]
        case "random":
            pass
    return origins


def plan_growth(saved: RunConfig, request: GrowthRequest) -> GrowthPlan:
    """Plan the growth of the model that was `saved` with this configuration; without sizes nothing grows.

    Raises ConfigError where the model cannot grow so.
    """
    settings = request.resolved(saved.model).settings
    after = grown_config(saved, request)
    return GrowthPlan(saved, after, settings, plan_tensors(saved.model, after.model, settings))


def plan_tensors(old: ModelConfig, new: ModelConfig, settings: GrowthConfig) -> dict[str, TensorPlan]:
    """Return, for every tensor of the model `new`, which one of `old` it was and what fills it."""
    old_layers, new_layers = layer_parts(old), layer_parts(new)
    # A decoder's layers are the embedding, its blocks and the head.
    blocks = layer_origins(old.num_layers, new.num_layers, settings)
    inner = [origin and replace(origin, index=origin.index + 1) for origin in blocks]
    origins = [LayerOrigin(0), *inner, LayerOrigin(old.num_layers + 1)]
    tensors: dict[str, TensorPlan] = {}
    for origin, layer in zip(origins, new_layers, strict=True):
        for part, specs in layer.items():
            # A part that the model is given, as the gates of a higher order, was nothing before.
            befores = None if origin is None else old_layers[origin.index].get(part)
            for spec, before in zip(specs, befores or [None] * len(specs), strict=True):
                is_copy = origin is not None and origin.copied
                tensors[spec.name] = TensorPlan(spec, before, _boxes(before, spec, is_copy, settings))
    return tensors


def _boxes(
    before: ParamSpec | None, spec: ParamSpec, is_copy: bool, settings: GrowthConfig
) -> tuple[FilledBox, ...]:
    """Return the boxes of a tensor that was `before`, or is a copy of it, or is drawn."""
    if before is None:
        return tuple(inserted_boxes(spec, settings.fill_rule))
    if is_copy:
        keeps_function = settings.depth_init != "stack"
        return tuple(copied_boxes(before, spec, settings.fill_rule, settings.split_share, keeps_function))
    return tuple(grown_boxes(before, spec, settings.fill_rule, settings.split_share))


def grown_manifest(source: Manifest, plan: GrowthPlan, parent: str) -> Manifest:
    """Return the manifest of the grown checkpoint: its counters go on, its lineage gains an entry.

    `parent` is the folder of the source; where nothing grows there is nothing to enter.
    """
    lineage = [*source.lineage]
    if plan.axes:
        lineage.append(
            {
                "parent": parent,
                "generation": generation(source),
                "axes": {name: list(sizes) for name, sizes in plan.axes.items()},
                "settings": dict(vars(plan.settings)),
                "step": source.progress.step,
                "tokens": source.progress.tokens,
                "flops": source.progress.flops,
            }
        )
    optimizer = replace(source.optimizer, grown_regions=regions_after_growth(source.optimizer, plan))
    if plan.settings.moments == "reset":
        optimizer = replace(optimizer, step_count=0, grown_regions=())
    return replace(
        source,
        specs=decoder_specs(plan.after.model),
        optimizer=optimizer,
        config=asdict(plan.after),
        lineage=lineage,
    )


def takes_moments(filled: FilledBox, settings: GrowthConfig) -> bool:
    """Return whether the moments of a box, and its step count, are those of where its weights come from."""
    if settings.moments == "reset" or filled.old is None:
        return False
    return not filled.is_new or settings.moments == "copied"


def generation(source: Manifest) -> int:
    """Return one plus the number of growths of a checkpoint's model."""
    return 1 + sum("generation" in entry for entry in source.lineage)


def regions_after_growth(optimizer: OptimizerRecord, plan: GrowthPlan) -> tuple[GrownRegion, ...]:
    """Return the regions with an Adam step count of their own: the recorded ones, moved, and the new."""
    recorded: dict[str, list[GrownRegion]] = {}
    for region in optimizer.grown_regions:
        recorded.setdefault(region.tensor, []).append(region)
    grown_regions = []
    for tensor in plan.tensors.values():
        name = tensor.spec.name
        for filled in tensor.boxes:
            if not takes_moments(filled, plan.settings):
                if optimizer.step_count:
                    grown_regions.append(GrownRegion(name, filled.box, optimizer.step_count))
                continue
            assert tensor.old is not None and filled.old is not None, f"{name} keeps elements of nothing"
            for region in recorded.get(tensor.old.name, []):
                if shared := intersect(region.box, filled.old):
                    moved = translate(shared, filled.old, filled.box)
                    grown_regions.append(GrownRegion(name, moved, region.adam_step))
    return tuple(grown_regions)


def translate(box: Box, origin: Box, target: Box) -> Box:
    """Return `box` translated as the box `origin` around it is moved to `target`."""
    offsets = zip(box.offsets, origin.offsets, target.offsets, strict=True)
    return Box(tuple(offset - start + new for offset, start, new in offsets), box.sizes)

"""What a growth does, as text: a table of tensors before it, a summary after it."""

from collections import Counter
from collections.abc import Iterator
from math import prod

from megatron_nexus.base.table import table
from megatron_nexus.checkpoint.data_file import DTYPE, STATES
from megatron_nexus.checkpoint.run_dir import complete_checkpoints
from megatron_nexus.checkpoint.saved_run import SavedRun
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import decayed_rate
from megatron_nexus.growth.plan import GrowthPlan, TensorPlan
from megatron_nexus.growth.settings import STACKING, ZERO_WARNING
from megatron_nexus.models.decoder import decoder_specs, layer_specs, training_flops_per_token
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.spec.param import Constant, Layout
from megatron_nexus.spec.shard import Shard


def plan_table(plan: GrowthPlan) -> list[str]:
    """Return the lines of a table: each parameter, its old and new shape, its fill, its bytes with moments.

    Parameters of equal layers share a line.
    """
    rows = [("parameter", "", "old shape", "new shape", "filled with", "bytes")]
    return table([*rows, *_rows(plan)], "<")


def _rows(plan: GrowthPlan) -> Iterator[tuple[str, str, str, str, str, str]]:
    alike: dict[tuple[object, ...], list[TensorPlan]] = {}
    for number, layer in enumerate(layer_specs(plan.after.model)):
        kind = number if number in (0, plan.after.model.num_layers + 1) else "block"
        for place, spec in enumerate(layer):
            tensor = plan.tensors[spec.name]
            key = (kind, place, tensor.old and tensor.old.shape, tensor.boxes)
            alike.setdefault(key, []).append(tensor)
    for tensors in alike.values():
        first = tensors[0]
        old = _shape(first.old.shape) if first.old else "inserted"
        size = len(tensors) * first.spec.numel * DTYPE.itemsize * len(STATES)
        times = f"x {len(tensors)}" if len(tensors) > 1 else ""
        yield first.spec.name, times, old, _shape(first.spec.shape), _filling(first), f"{size:,}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _filling(tensor: TensorPlan) -> str:
    """Say what fills how many of a tensor's elements: "kept 600,000, zero 240,000"."""
    init = tensor.spec.init
    counts: Counter[str] = Counter()
    for filled in tensor.boxes:
        label = f"{init.value:g}" if isinstance(init, Constant) and filled.old is None else filled.fill
        counts[label] += prod(filled.box.sizes)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{fill} {count:,}" for fill, count in counts.items())


def warnings(plan: GrowthPlan, saved: SavedRun) -> Iterator[str]:
    """Yield what a user should know of the growth of a saved run: what it changes, what it may cost."""
    if plan.axes and plan.settings.init == "zero":
        yield ZERO_WARNING
    settings = plan.settings
    if settings.init == "split" and plan.axes and settings.split_share < 1.0:
        yield (
            f"--split-share {settings.split_share:g} gives copies outgoing weights of one sign: Adam divides "
            "the size of gradients away, and they hardly part; above 1, as 1.5, they do"
        )
    for flag in plan.changes:
        yield f"{flag} changes the function: the loss jumps at the growth, and --verify only says how far"
        if flag == STACKING:
            yield (
                "it ended lowest where it was measured (docs/progressive_scaling.md); --depth-init copy "
                "keeps the function"
            )
    if plan.axes and (warning := _decay_warning(saved)):
        yield warning


def _decay_warning(saved: SavedRun) -> str | None:
    """Say what it costs to grow a run whose learning rate has decayed, and what to grow instead."""
    config, step = saved.config, saved.manifest.progress.step
    rate = decayed_rate(config, step)
    if rate is None:
        return None
    stable = [
        folder.name
        for at, folder in sorted(complete_checkpoints(saved.checkpoint.parent).items())
        if config.optimizer.lr_decay_style == "WSD" and at < step and decayed_rate(config, at) is None
    ]
    remedy = (
        f"Grow {stable[-1]}, which is before the decay"
        if stable
        else "Train with --lr-decay-style WSD and grow before the decay"
    )
    return (
        f"warning: {saved.checkpoint.name} is past its peak learning rate ({rate:.2e} of "
        f"{config.optimizer.lr:.2e}). Growing now needs a second warm-up and decay, which cost up to "
        f"0.08 nats where it was measured. {remedy}. docs/growth.md#the-schedule"
    )


def checkpoint_bytes(model: ModelConfig) -> int:
    """Return the bytes of a model's weights and moments."""
    return parameter_count(decoder_specs(model).values()) * DTYPE.itemsize * len(STATES)


def size_lines(plan: GrowthPlan) -> Iterator[str]:
    """Yield parameters, FLOPs and bytes before and after, and which widths are padded in memory."""
    for name, (old, new) in plan.axes.items():
        yield f"  {name:<24} {old:,} -> {new:,}"
    yield from recipe_lines(plan)
    before, after = plan.before, plan.after
    counts = [parameter_count(decoder_specs(config.model).values()) for config in (before, after)]
    length = after.training.seq_length
    flops = [training_flops_per_token(config.model, length) for config in (before, after)]
    yield f"  {'parameters':<24} {counts[0]:,} -> {counts[1]:,}"
    yield f"  {'training FLOPs per token':<24} {flops[0]:,} -> {flops[1]:,}"
    yield f"  {'bytes of the checkpoint':<24} {checkpoint_bytes(after.model):,}"
    yield from _padding_lines(after)


def recipe_lines(plan: GrowthPlan) -> Iterator[str]:
    """Yield how new units and new layers begin, with which moments; nothing where nothing grows."""
    settings = plan.settings
    if {*plan.axes} - {"num_layers", "vocab_size", "attention_order"}:
        yield f"  {'new units':<24} {settings.init}"
    if "num_layers" in plan.axes:
        place = "at the end" if settings.placement == "end" else settings.placement
        yield f"  {'new layers':<24} {settings.depth_init}, {place}"
    if plan.axes:
        yield f"  {'moments':<24} {settings.moments}"


def _padding_lines(config: RunConfig) -> Iterator[str]:
    tp = config.parallel.tensor_model_parallel_size
    shard = Shard(0, tp, config.parallel.padding_multiple or 1)
    split = {
        axis.name: axis
        for spec in decoder_specs(config.model).values()
        for axis in spec.axes
        if axis.layout is Layout.SHARDED_PADDED
    }
    for axis in split.values():
        padded = shard.part(axis) * tp
        if padded != axis.size:
            yield f"  {axis.name:<24} {axis.size:,}, in memory padded to {padded:,} at --tp {tp}"

"""Memory plan: what each rank of a run will hold, by replaying an optimizer step without data.

The activations of a micro-batch come from `trace`, the model's states and DeepSpeed's buffers from
`engine_memory`, which answers each complete gradient. Both are replayed in the order of the pipeline engine
(1F1B). Traces are cached: another data-parallel size, ZeRO stage or batch is planned in milliseconds.

All sizes in bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_nexus.base.table import table
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.decoder import layer_specs, stage_layers
from megatron_nexus.models.layer_context import DTYPES, padding_multiple
from megatron_nexus.planner.engine_memory import EngineMemory, Memory, ParameterSize, engine_memory_of
from megatron_nexus.planner.trace import KEPT, Pass, StageShape, trace
from megatron_nexus.spec.shard import Shard

COLUMNS = ("weights", "gradients", "optimizer", "activations", "buffers")
STATE = COLUMNS[:3]
MIB = 2**20


@dataclass(frozen=True)
class RankMemory:
    """What a rank holds: the most of each column, and the most of all at one moment, which is less."""

    columns: Mapping[str, int]
    peak: int


def plan_memory(config: RunConfig, world_size: int, device_type: str) -> list[RankMemory]:
    """Return the memory of each pipeline stage's ranks.

    Where they differ (ZeRO 2), of the one that holds most. `device_type`: "cpu", or "cuda", which
    need not be there.
    """
    plan = []
    for stage, layers in enumerate(stage_ranges(config)):
        memory, engine, parameters = _started(config, world_size, layers, device_type)
        shape = stage_shape(config, layers, device_type)
        behind = config.parallel.pipeline_model_parallel_size - stage
        # The second step has the moments, which the first one makes.
        for _ in range(2):
            _replay_step(memory, engine, shape, parameters, config.accumulation_steps(world_size), behind)
        plan.append(RankMemory({name: memory.most[name] for name in COLUMNS}, memory.peak))
    return plan


def plan_state(config: RunConfig, world_size: int, device_type: str) -> list[Mapping[str, int]]:
    """Return the columns STATE of `plan_memory` alone: no activations are traced.

    Not counted is what lives for a moment: gradients on their way into the bucket of ZeRO 2 and 3, or of bf16
    into the fp32 ones.
    """
    plan: list[Mapping[str, int]] = []
    for layers in stage_ranges(config):
        memory, engine, _ = _started(config, world_size, layers, device_type)
        passes = min(2, config.accumulation_steps(world_size))  # the second adds to what the first leaves
        for index in range(passes):
            engine.before_backward()
            for number in range(len(engine.sizes)):
                engine.gradient(number, transient=False)
            engine.after_backward(last=index == passes - 1)
        engine.step()
        plan.append({name: memory.most[name] for name in STATE})
    return plan


def stage_ranges(config: RunConfig) -> list[range]:
    """Return the layers of each pipeline stage."""
    stages = config.parallel.pipeline_model_parallel_size
    return stage_layers(config.model, config.training.seq_length, stages)


def stage_parameters(config: RunConfig, layers: range, device_type: str) -> list[Mapping[str, ParameterSize]]:
    """Return for each layer the parameters of a rank by name, padding included."""
    shard = Shard(0, config.parallel.tensor_model_parallel_size, padding_multiple(config, device_type))
    embedding, block, head = (
        {
            spec.name.removeprefix("layers.0."): ParameterSize(prod(shard.local_shape(spec)), spec.decays)
            for spec in specs
        }
        for specs in layer_specs(replace(config.model, num_layers=1))
    )
    last = config.model.num_layers + 1
    return [embedding if index == 0 else head if index == last else block for index in layers]


def _started(
    config: RunConfig, world_size: int, layers: range, device_type: str
) -> tuple[Memory, EngineMemory, list[Mapping[str, int]]]:
    """Return a stage's account, its engine, and for each layer the numbers of its parameters by name."""
    parameters: list[Mapping[str, int]] = []
    sizes: list[ParameterSize] = []
    for layer in stage_parameters(config, layers, device_type):
        parameters.append({name: len(sizes) + index for index, name in enumerate(layer)})
        sizes += layer.values()
    memory = Memory()
    engine = engine_memory_of(config)(memory, config, world_size, sizes, device_type)
    engine.start()
    return memory, engine, parameters


def stage_shape(config: RunConfig, layers: range, device_type: str) -> StageShape:
    """Return what decides the activations and kernels of a stage."""
    model, training, parallel = config.model, config.training, config.parallel
    first, last = layers[0] == 0, layers[-1] == model.num_layers + 1
    return StageShape(
        # A layer without rotary embedding keeps up to 5 % less than the others: planned as one of them.
        replace(model, num_layers=len(layers) - first - last, no_rope_freq=0),
        has_embedding=first,
        has_head=last,
        tp_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=training.micro_batch_size,
        seq_length=training.seq_length,
        dtype=DTYPES[training.precision],
        recompute=training.recompute_granularity,
        compiled=training.compile,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
        device_type=device_type,
        multiple=padding_multiple(config, device_type),
        linear_loss=training.cross_entropy_fusion_impl == "linear",
    )


def _replay_step(
    memory: Memory,
    engine: EngineMemory,
    shape: StageShape,
    parameters: Sequence[Mapping[str, int]],
    micro_batches: int,
    behind: int,
) -> None:
    """Replay an optimizer step of a stage, from which `behind` stages lead to the loss, itself included."""
    traced = trace(shape)
    in_flight = min(behind, micro_batches)
    micro_batches = min(micro_batches, in_flight + 2)  # from there on each is like the one before
    # Labels, and one buffer for each way in which the stage receives.
    ways = (not shape.has_embedding) + (not shape.has_head)
    memory.hold("activations", 8 * shape.tokens + ways * shape.output_bytes + traced.table_bytes)
    for index in range(micro_batches + in_flight - 1):
        if index < micro_batches:
            let_go = traced.kept_bytes if index >= 2 else 0
            _replay(traced.forward, memory, engine, parameters, let_go)
        if (done := index - in_flight + 1) >= 0:
            engine.before_backward()
            _replay(traced.backward, memory, engine, parameters[::-1])
            engine.after_backward(last=done == micro_batches - 1)
    engine.step()
    # The step's end frees what it keeps between micro-batches.
    memory.swing("activations", 0, -memory.held["activations"])


def _replay(
    passed: Pass,
    memory: Memory,
    engine: EngineMemory,
    parameters: Sequence[Mapping[str, int]],
    let_go: int = 0,
) -> None:
    """Replay a pass; `parameters` has the numbers of each layer's parameters, in the order run."""
    # What comes before the layers, as the loss of a backward pass, has no parameters but those of the head.
    for span, numbers in zip([passed.before, *passed.layers], [parameters[0], *parameters], strict=True):
        for event in span.events:
            if not isinstance(event, str):
                memory.swing("activations", *event)
            elif event == KEPT:
                memory.swing("activations", 0, -let_go)
            else:
                engine.gradient(numbers[event])


def rank_groups(
    plan: Sequence[Mapping[str, int]], world_size: int
) -> list[tuple[int, int, Mapping[str, int]]]:
    """Return first rank, last rank and bytes by column of neighbouring stages that hold the same."""
    ranks_per_stage = world_size // len(plan)
    groups: list[tuple[int, int, Mapping[str, int]]] = []
    for stage, memory in enumerate(plan):
        first, last = stage * ranks_per_stage, (stage + 1) * ranks_per_stage - 1
        if groups and groups[-1][2] == memory:
            first = groups.pop()[0]
        groups.append((first, last, memory))
    return groups


def memory_table(plan: Sequence[Mapping[str, int]], world_size: int) -> list[str]:
    """Return the lines of a table in MiB; `plan` has the bytes of a rank of each stage by column."""
    rows = [["ranks", *plan[0]]]
    for first, last, memory in rank_groups(plan, world_size):
        ranks = f"{first}-{last}" if last > first else f"{first}"
        rows.append([ranks, *(f"{size / MIB:,.1f}" for size in memory.values())])
    return table(rows, ">")

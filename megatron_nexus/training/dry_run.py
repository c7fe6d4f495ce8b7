"""What `--dry-run` tells: the resolved configuration, its costs, and what each rank will hold.

Starts no process group, opens no data and imports no DeepSpeed.
"""

import os
from collections.abc import Sequence

import torch

from megatron_nexus.config.command_line import model_name
from megatron_nexus.config.presets import PAPER_SIZES
from megatron_nexus.config.rules import notes
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.decoder import decoder_specs, layer_flops_per_token, training_flops_per_token
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.training.machine import padding_multiple
from megatron_nexus.training.memory_plan import COLUMNS, RankMemory, plan_memory

MIB = 2**20


def report(config: RunConfig, world_size: int) -> list[str]:
    """The lines of a dry run of `config` on `world_size` ranks of machines like this one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_memory(config, world_size, device, padding_multiple(config, device))
    parallel, training = config.parallel, config.training
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    dp = config.data_parallel_size(world_size)
    flops = sum(layer_flops_per_token(config.model, training.seq_length))
    return [
        "",
        _size(config),
        f"FLOPs per token: {flops:,} forward, "
        f"{training_flops_per_token(config.model, training.seq_length):,} forward and backward",
        f"tokens per optimizer step: {training.global_batch_size * training.seq_length:,}, "
        f"in {config.accumulation_steps(world_size)} micro-batches per rank",
        f"mesh: tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x data {dp} = {ranks}; "
        f"{training.precision}, ZeRO {max(1, parallel.zero_stage)}, recompute "
        f"{training.recompute_granularity}",
        "",
        f"memory per rank in MiB, on {'CUDA devices' if device.type == 'cuda' else 'CPUs'}: tensors, "
        "without Python, libraries and what an allocator loses",
        *_table(plan, world_size),
        "each column is its own most; the peak is the most of all at one moment",
        *_device_notes(plan, world_size, device),
        *(f"note: {note}" for note in notes(config)),
    ]


def _size(config: RunConfig) -> str:
    name = model_name(config)
    line = f"{name}: {parameter_count(decoder_specs(config.model).values()):,} parameters"
    return f"{line}; the paper calls it {PAPER_SIZES[name]}" if name in PAPER_SIZES else line


def _table(plan: Sequence[RankMemory], world_size: int) -> list[str]:
    """A row for the ranks that hold the same: those of a stage, and of stages alike."""
    share = world_size // len(plan)
    rows: list[tuple[int, int, RankMemory]] = []
    for stage, memory in enumerate(plan):
        first, last = stage * share, (stage + 1) * share - 1
        if rows and rows[-1][2] == memory:
            first = rows.pop()[0]
        rows.append((first, last, memory))
    lines = [f"{'ranks':>11}" + "".join(f"{name:>13}" for name in (*COLUMNS, "peak"))]
    for first, last, memory in rows:
        ranks = f"{first}-{last}" if last > first else f"{first}"
        cells = [*(memory.columns[name] for name in COLUMNS), memory.peak]
        lines.append(f"{ranks:>11}" + "".join(f"{size / MIB:>13,.1f}" for size in cells))
    return lines


def _device_notes(plan: Sequence[RankMemory], world_size: int, device: torch.device) -> list[str]:
    """What this machine makes of the plan."""
    peak = max(memory.peak for memory in plan)
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
        return [f"warning: a device of this machine has {has / MIB:,.0f} MiB"] if peak > has else []
    needed = sum(memory.peak for memory in plan) * (world_size // len(plan))
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [
        "note: accelerators differ: split axes are padded to 64, norms keep no fp32 copies, and ZeRO 2 and 3 "
        "take their whole reduce bucket (5e8 elements, --deepspeed-config); run --dry-run on one to see them"
    ]
    if needed > has:
        lines.insert(
            0,
            f"warning: all ranks need {needed / MIB:,.0f} MiB and this machine has {has / MIB:,.0f}: use "
            "more machines, --recompute-granularity full, or a smaller --micro-batch-size",
        )
    return lines

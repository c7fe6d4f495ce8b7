"""The report of `--dry-run`: the costs of a configuration, and what each rank will hold.

Starts no process group, opens no data and imports no DeepSpeed.
"""

import os
from collections.abc import Sequence

import torch

from megatron_nexus.config.rules import config_warnings
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.layer_context import padding_multiple
from megatron_nexus.planner.memory import MIB, RankMemory, memory_table, plan_memory
from megatron_nexus.planner.model_cost import flops_line, model_cost, size_line


def report(config: RunConfig, world_size: int) -> list[str]:
    """Return the lines of a dry run of `config` on `world_size` ranks of machines like this one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_memory(config, world_size, device, padding_multiple(config, device))
    parallel, training = config.parallel, config.training
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    dp = config.data_parallel_size(world_size)
    cost, steps = model_cost(config), config.accumulation_steps(world_size)
    return [
        "",
        size_line(cost),
        flops_line(cost),
        f"tokens per optimizer step: {training.global_batch_size * training.seq_length:,}, "
        f"in {steps} micro-batch{'es' if steps > 1 else ''} per rank",
        f"mesh: tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x data {dp} = {ranks}; "
        f"{training.precision}, ZeRO {max(1, parallel.zero_stage)}, recompute "
        f"{training.recompute_granularity}",
        "",
        f"memory per rank in MiB, on {'CUDA devices' if device.type == 'cuda' else 'CPUs'}: tensors, "
        "without Python, libraries and what an allocator loses",
        *memory_table([{**memory.columns, "peak": memory.peak} for memory in plan], world_size),
        "each column is its own most; the peak is the most of all at one moment",
        *_device_notes(plan, world_size, device),
        *(f"note: {note}" for note in config_warnings(config)),
    ]


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

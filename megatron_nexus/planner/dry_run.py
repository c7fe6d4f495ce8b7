"""The report of `--dry-run`: the costs of a configuration, what each rank will hold, how long a step takes.

Starts no process group, opens no data and imports no DeepSpeed.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_nexus.config.devices import DEVICES, GIB, TERA, Device, find_device
from megatron_nexus.config.rules import check, config_warnings
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.attention_backend import alignment_notes
from megatron_nexus.planner.layouts import Candidate, Layout, Search, layouts
from megatron_nexus.planner.memory import MIB, RankMemory, memory_table, plan_memory
from megatron_nexus.planner.model_cost import flops_line, model_cost, size_line
from megatron_nexus.planner.step_time import StepTime, cause_line, step_time

MOST_DOUBLINGS = 10
"""Doublings of the devices, until a plan fits."""


def report(config: RunConfig, world_size: int, device: Device | None = None) -> list[str]:
    """Return the lines of a dry run of `config` on `world_size` ranks, of devices or of this machine."""
    device = device or _own_device()
    plan = plan_memory(config, world_size, "cuda" if device else "cpu")
    training = config.training
    cost, steps = model_cost(config), config.accumulation_steps(world_size)
    return [
        size_line(cost),
        flops_line(cost),
        f"tokens per optimizer step: {training.global_batch_size * training.seq_length:,}, "
        f"in {steps} micro-batch{'es' if steps > 1 else ''} per rank",
        _mesh_line(config, world_size),
        "",
        f"memory per rank in MiB, on {device.name if device else 'CPUs'}: tensors, "
        "without Python, libraries and what an allocator loses",
        *memory_table([{**memory.columns, "peak": memory.peak} for memory in plan], world_size),
        "each column is its own most; the peak is the most of all at one moment",
        *(_device_notes(config, plan, world_size, device) if device else _machine_notes(plan, world_size)),
        *(_time_lines(config, world_size, device) if device else ()),
        *(f"note: {note}" for note in config_warnings(config)),
        *(f"note: {note}" for note in alignment_notes(config, "cuda" if device else "cpu")),
    ]


def search_report(config: RunConfig, world_size: int, device: Device, count: int = 5) -> list[str]:
    """Return the lines of a search: the fastest layouts that fit, each with its flags.

    Raises ConfigError where the rules allow no layout on so many devices.
    """
    if next(layouts(config, world_size, device), None) is None:
        check(config, world_size)  # the present one neither, and that says why
    began = time.perf_counter()
    search = Search(config, device)
    found = search.fastest(world_size, count)
    took_s = time.perf_counter() - began
    lines = [
        size_line(model_cost(config)),
        f"layouts on {world_size} x {device.name}, found in {took_s:.1f} s",
    ]
    if not found:
        return [*lines, f"warning: nothing fits on {world_size}" + _more_devices(search, world_size)]
    for place, one in enumerate(found, 1):
        lines += [
            "",
            f"{place}. predicted {_speed(one.time)}; {cause_line(one.time)}; {one.peak_bytes / GIB:.1f} of "
            f"{device.usable_bytes / GIB:.1f} GiB",
            f"   {' '.join(one.layout.flags().values())}",
        ]
    return lines


def _own_device() -> Device | None:
    """Return this machine's first device with its own memory, None on a CPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    known = find_device(properties.name) or Device(properties.name, memory=0, bf16=0, bandwidth=0)
    return replace(known, name=properties.name, memory=properties.total_memory / GIB)


def _mesh_line(config: RunConfig, world_size: int) -> str:
    parallel, training = config.parallel, config.training
    return (
        f"mesh: tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x data {config.data_parallel_size(world_size)} = "
        f"{world_size} rank{'s' if world_size > 1 else ''}; {training.precision}, "
        f"ZeRO {max(1, parallel.zero_stage)}, recompute {training.recompute_granularity}"
    )


def _speed(predicted: StepTime) -> str:
    return f"{predicted.tokens_per_s:,.0f} tokens/s, MFU {100 * predicted.mfu:.1f} %"


def _time_lines(config: RunConfig, world_size: int, device: Device) -> list[str]:
    if not device.bf16:
        return [
            f"note: the rates of {device.name} are not known, hence no time of a step: give them as --device"
        ]
    predicted = step_time(config, world_size, device)
    gemm = predicted.gemm_flops_per_s / world_size / TERA
    causes = sorted(predicted.seconds, key=predicted.share, reverse=True)
    return [
        "",
        f"predicted, not measured: {predicted.total_s:.3g} s a step, {_speed(predicted)}",
        f"predicted, not measured: {predicted.tokens_per_s / world_size:,.0f} tokens/s a device, "
        f"{100 * predicted.gemm_share:.1f} % of the {gemm:,.0f} TFLOP/s that large products reach",
        "predicted, not measured: "
        + ", ".join(
            f"{cause} {100 * share:.0f} %" for cause in causes if (share := predicted.share(cause)) > 0.005
        ),
    ]


def _device_notes(
    config: RunConfig, plan: Sequence[RankMemory], world_size: int, device: Device
) -> list[str]:
    """Warn where the plan is more than the device has, with the least change that fits."""
    peak = max(memory.peak for memory in plan)
    if peak <= device.usable_bytes:
        return []
    # Where rates are not known any will do: memory decides.
    search = Search(config, device if device.bf16 else replace(DEVICES["h100"], memory=device.memory))
    least = search.least_change(world_size)
    remedy = _fits(config, least) if least else _more_devices(search, world_size)
    return [
        f"warning: {peak / GIB:.1f} GiB are more than the {device.usable_bytes / GIB:.1f} that tensors may "
        f"take of the {device.memory:.1f} of {device.name}{remedy}"
    ]


def _fits(config: RunConfig, candidate: Candidate) -> str:
    changes = " ".join(candidate.layout.changes(Layout.of(config)))
    return f": {changes} needs {candidate.peak_bytes / GIB:.1f} GiB"


def _more_devices(search: Search, world_size: int) -> str:
    """Return on how many devices a layout fits, and which."""
    for doubling in range(1, MOST_DOUBLINGS + 1):
        ranks = world_size << doubling
        if least := search.least_change(ranks):
            changes = _fits(search.config, least).lstrip(":")
            return f", whatever the layout: --world-size {ranks}{changes}"
    return f"; no layout of up to {world_size << MOST_DOUBLINGS} devices fits: use a smaller model"


def _machine_notes(plan: Sequence[RankMemory], world_size: int) -> list[str]:
    """What this machine, a CPU, makes of the plan."""
    needed = sum(memory.peak for memory in plan) * (world_size // len(plan))
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    warning = (
        f"warning: all ranks need {needed / MIB:,.0f} MiB and this machine has {has / MIB:,.0f}: use more "
        "machines, --recompute-granularity full, or a smaller --micro-batch-size"
    )
    note = "note: a GPU holds and takes something else: --device h100, say, plans for one"
    return [warning, note] if needed > has else [note]

"""DeepSpeed's own configuration: derived from ours, with a user's file merged into it.

What follows from our flags a file can only repeat; what concerns DeepSpeed alone (buckets, overlap,
profilers, monitors) it sets; what a checkpoint of ours could not hold, such as offloading, is refused.
"""

import difflib
from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any, cast

from megatron_nexus.base.json_text import read_object
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError

Json = dict[str, "bool | int | float | str | list[Json] | Json | None"]

# ZeRO 2 and 3 refuse the two that say otherwise, or, without reduce_scatter, ZeRO 3 leaves gradients divided.
_AFTER = "always divided after the sum, which overflows in fp16 alone"
# What follows from our flags, by its dotted key.
FLAG_OF = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "gradient_clipping": "--clip-grad",
    "bf16.enabled": "--precision",
    "zero_optimization.stage": "--zero-stage",
    "data_types.grad_accum_dtype": "always fp32",
    "prescale_gradients": _AFTER,
    "gradient_predivide_factor": _AFTER,
}
# What a file may set, with its type; "auto" leaves it at its default.
FREE: dict[str, type] = {
    **dict.fromkeys(("comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor"), dict),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), bool),
    "bf16.immediate_grad_update": bool,
    "timers.throughput.enabled": bool,
    "communication_data_type": str,
    "steps_per_print": int,
    "zero_optimization.overlap_comm": bool,
    "zero_optimization.contiguous_gradients": bool,
    "zero_optimization.reduce_scatter": bool,
    "zero_optimization.allgather_partitions": bool,
    "zero_optimization.reduce_bucket_size": int,
    "zero_optimization.allgather_bucket_size": int,
    "zero_optimization.sub_group_size": int,
    "zero_optimization.stage3_max_live_parameters": int,
    "zero_optimization.stage3_max_reuse_distance": int,
    "zero_optimization.stage3_prefetch_bucket_size": int,
    "zero_optimization.stage3_param_persistence_threshold": int,
}
# Numbers that DeepSpeed divides by or refuses as 0; no number of a file may be below 0.
POSITIVE = ("steps_per_print", "zero_optimization.reduce_bucket_size")
COMMUNICATED = ("fp16", "bf16", "fp32")
# What scripts made for other codebases hold, and where it is set here.
ELSEWHERE = {
    "optimizer": "--lr, --weight-decay and the other flags of AdamW",
    "scheduler": "--lr-decay-style and --lr-warmup-iters",
    "fp16": "--bf16: fp16 with loss scaling is not offered",
    "activation_checkpointing": "--recompute-granularity",
    "pipeline": "--pp",
    "zero_optimization.offload_optimizer": "--zero-stage 3: checkpoints hold nothing offloaded",
    "zero_optimization.offload_param": "--zero-stage 3: checkpoints hold nothing offloaded",
}


def deepspeed_config(config: RunConfig, world_size: int, device_type: str = "cpu") -> Json:
    """Return the dict for `deepspeed.initialize` on devices of a type, such as "cuda".

    Stage 0 is served as stage 1: DeepSpeed's stage 0 takes a real optimizer step with zero gradients when
    it starts in bf16, and clips by a wrong norm under pipeline or tensor parallelism. So there is always a
    master copy in fp32, and gradients accumulate in fp32. They are also summed over ranks in fp32: in bf16,
    DeepSpeed's default, stage 1 rounds the accumulated gradients before clipping, even of a single rank.

    Raises ConfigError where the user's file cannot be read or contradicts the flags.
    """
    training, optimizer = config.training, config.optimizer
    stage = max(1, config.parallel.zero_stage)
    # Stage 1 would copy every gradient into a new buffer of `reduce_bucket_size`: 5 % of a step on a CPU.
    zero: Json = {
        "stage": stage,
        # DeepSpeed's default on accelerators; a CPU has no streams to overlap: 5 % of a step.
        "overlap_comm": stage == 3 and device_type != "cpu",
        "contiguous_gradients": stage > 1,
        # Stage 2 all-reduces either way; with it, slice by slice, after a division in bf16.
        "reduce_scatter": stage != 2,
    }
    bf16: Json = {"enabled": training.precision == "bf16"}
    if training.precision == "bf16":
        # Each gradient is added to the fp32 one as it comes, and freed: the same bits without a second copy.
        bf16["immediate_grad_update"] = True
    derived: Json = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": optimizer.clip_grad,
        "bf16": bf16,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "zero_optimization": zero,
        # Each rank sends whole activations: under sequence parallelism they are already its own share.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        # Our own log reports progress; a huge interval silences DeepSpeed's.
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        # It waits for the device twice in a micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.parallel.deepspeed_config:
        path = Path(config.parallel.deepspeed_config)
        problems = list(_merge(read_object("--deepspeed-config", path), derived, ""))
        monitor = derived.get("wandb")
        if config.logging.wandb_project and isinstance(monitor, dict) and monitor.get("enabled"):
            problems.append(
                f"wandb is enabled, and --wandb-project {config.logging.wandb_project} logs there too, in "
                "one process: drop one of them"
            )
        if problems:
            raise ConfigError([f"--deepspeed-config {path}: {problem}" for problem in problems])
    return derived


def engine_reduces_gradients(settings: Json) -> bool:
    """Return whether gradients are reduced by our engine (`GradientReducer`) and not by DeepSpeed.

    So they are at ZeRO 1, unless the user's file asks for something that DeepSpeed's own reduction has.
    """
    zero = settings["zero_optimization"]
    assert isinstance(zero, dict)
    asked = zero["overlap_comm"] or zero["contiguous_gradients"] or not zero["reduce_scatter"]
    return zero["stage"] == 1 and settings["communication_data_type"] == "fp32" and not asked


def bucket_elements(config: RunConfig, world_size: int, settings: Json) -> int:
    """Return the least size of a bucket of gradients, Megatron-LM's by default; 0: there are no buckets."""
    copies = config.data_parallel_size(world_size)
    if copies == 1 or not config.parallel.overlap_grad_reduce or not engine_reduces_gradients(settings):
        return 0
    return config.parallel.ddp_bucket_size or max(40_000_000, 1_000_000 * copies)


def _merge(theirs: Mapping[str, object], derived: Json, above: str) -> Iterable[str]:
    """Put what a file may set into `derived`; yield what it may not."""
    for key, value in theirs.items():
        name = above + key
        ours = derived.get(key)
        if name in FLAG_OF:
            if value not in (ours, "auto"):
                or_flag = ", or change the flag" if FLAG_OF[name].startswith("--") else ""
                yield (
                    f"{name} is {value!r}, and the flags make it {ours!r} ({FLAG_OF[name]}): "
                    f"drop it from the file{or_flag}"
                )
        elif name in FREE:
            kind, least = FREE[name], "above 0" if name in POSITIVE else "0 or above"
            numbers = (int, float) if kind is int else kind  # 5e8 is a float
            if value == "auto":
                continue
            if not isinstance(value, numbers) or (isinstance(value, bool) and kind is not bool):
                wanted = f"a value of type {kind.__name__}"
            elif isinstance(value, float | int) and not (
                0 < value < inf or (value == 0 and name not in POSITIVE)
            ):
                wanted = f"a finite number, {least}"
            elif isinstance(value, dict) and not isinstance(value.get("enabled", False), bool):
                name, value, wanted = f"{name}.enabled", value["enabled"], "true or false"
            elif name == "communication_data_type" and value not in COMMUNICATED:
                wanted = f"one of {', '.join(COMMUNICATED)}"
            else:
                derived[key] = cast(Any, int(cast(float, value)) if kind is int else value)
                continue
            yield f"{name} is {value!r}: give {wanted}, or drop it"
        elif name in ELSEWHERE:
            if value not in ({"enabled": False}, {"device": "none"}):
                yield f"{name} cannot be set here: drop it, and use {ELSEWHERE[name]}"
        elif isinstance(value, dict) and isinstance(ours, dict):
            yield from _merge(value, ours, f"{name}.")
        else:
            siblings = [known[len(above) :] for known in (*FREE, *FLAG_OF) if known.startswith(above)]
            near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.7)
            yield f"{name} is not supported: " + (f"did you mean {above}{near[0]}?" if near else "drop it")

"""DeepSpeed's own configuration, derived from ours: nobody writes it by hand."""

from megatron_nexus.config.run_config import RunConfig

Json = dict[str, "bool | int | float | str | Json"]


def deepspeed_config(config: RunConfig, world_size: int) -> Json:
    """The dict for `deepspeed.initialize`.

    Stage 0 is served as stage 1: DeepSpeed's stage 0 takes a real optimizer step with zero gradients when
    it starts in bf16, and clips by a wrong norm under pipeline or tensor parallelism. So there is always a
    master copy in fp32, and gradients accumulate in fp32.
    """
    training, optimizer = config.training, config.optimizer
    stage = max(1, config.parallel.zero_stage)
    # Stage 1 would copy every gradient into a new buffer of `reduce_bucket_size`: 5 % of a step on a CPU.
    zero: Json = {"stage": stage, "overlap_comm": False, "contiguous_gradients": stage > 1}
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": optimizer.clip_grad,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        # Each rank sends whole activations: under sequence parallelism they are already its own share.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        # Our own log reports progress; a huge interval silences DeepSpeed's.
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }

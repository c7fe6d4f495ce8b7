"""Flags of Megatron-LM, GPT-NeoX and DeepSpeed scripts that mean nothing here, and what takes their place.

Read when a flag is unknown: whoever brings a script along is told what each of its flags became.
"""

_ALWAYS = "drop it: the decoder always has this"
_NEVER = "drop it: the decoder never has this"
_INSTEAD: dict[str, str] = {
    # the model
    "swiglu": "drop it: --feed-forward swiglu is the default",
    "untie-embeddings-and-output-weights": _ALWAYS,
    "disable-bias-linear": _ALWAYS,
    "use-rotary-position-embeddings": _ALWAYS,
    "use-flash-attn": "drop it: attention runs through PyTorch's scaled_dot_product_attention",
    "attention-backend": "drop it: attention runs through PyTorch's scaled_dot_product_attention",
    "transformer-impl": "drop it: there is one implementation",
    "use-mcore-models": "drop it: there is one implementation",
    "spec": "drop it: --preset and the model flags describe the model",
    "position-embedding-type": "drop it: rotary positions are used; --rotary-base sets their base",
    "rotary-percent": "drop it: all channels of a head are turned",
    "max-position-embeddings": "use --seq-length: rotary positions have no table",
    "group-query-attention": "use --num-query-groups alone",
    "attention-dropout": _NEVER,
    "hidden-dropout": _NEVER,
    "apply-layernorm-1p": _NEVER,
    "num-experts": _NEVER,
    "expert-model-parallel-size": _NEVER,
    "make-vocab-size-divisible-by": "use --padding-multiple: every split axis is padded in memory",
    "layernorm-epsilon": "use --norm-epsilon",
    "init-method-xavier-uniform": "use --init-method-std: weights start as N(0, std^2)",
    # parallelism
    "num-layers-per-virtual-pipeline-stage": "drop it: stages are cut by cost, one piece each",
    "context-parallel-size": "use --sequence-parallel, or --recompute-granularity full, for long samples",
    "use-distributed-optimizer": "use --zero-stage 1",
    "overlap-grad-reduce": "use --deepspeed-config with zero_optimization.overlap_comm",
    "overlap-param-gather": "use --deepspeed-config with zero_optimization.overlap_comm",
    "tp-comm-overlap": "drop it: collectives are fused instead",
    "distributed-backend": "drop it: NCCL on GPUs, gloo on CPUs",
    "distributed-timeout-minutes": "drop it: ranks notice at once when one ends",
    "deepspeed-activation-checkpointing": "use --recompute-granularity",
    "zero-reduce-scatter": "drop it: ZeRO reduces as DeepSpeed's stage does",
    "no-pipeline-parallel": "use --pp 1",
    "use-cpu-initialization": "drop it: initial weights do not depend on the device or the topology",
    # the step
    "fp16": "use --bf16: fp16 with loss scaling is not offered",
    "fp8-format": "use --bf16",
    "loss-scale": "drop it: bf16 needs none",
    "initial-loss-scale": "drop it: bf16 needs none",
    "accumulate-allreduce-grads-in-fp32": "drop it: gradients always accumulate in fp32",
    "attention-softmax-in-fp32": "drop it: the attention kernel does that",
    "recompute-activations": "use --recompute-granularity selective",
    "checkpoint-activations": "use --recompute-granularity full",
    "recompute-method": "drop it: --recompute-granularity full keeps the input of every block",
    "recompute-num-layers": "drop it: --recompute-granularity full keeps the input of every block",
    "gradient-accumulation-steps": "use --global-batch-size: steps follow from it",
    "rampup-batch-size": "drop it: the batch has one size; change --global-batch-size with --load",
    "optimizer": "drop it: AdamW is used",
    "train-samples": "use --train-iters or --train-tokens",
    "lr-decay-samples": "use --lr-decay-iters",
    "lr-warmup-samples": "use --lr-warmup-iters",
    "lr-warmup-fraction": "use --lr-warmup-iters",
    "lr-wsd-decay-samples": "use --lr-wsd-decay-iters",
    "lr-warmup-init": "drop it: warm-up starts from zero",
    "decoupled-lr": "drop it: one learning rate for all parameters",
    "start-weight-decay": "use --weight-decay",
    "end-weight-decay": "use --weight-decay",
    "no-masked-softmax-fusion": "drop it: there is no such kernel",
    "no-gradient-accumulation-fusion": "drop it: there is no such kernel",
    "no-bias-gelu-fusion": "drop it: there is no such kernel",
    "no-rope-fusion": "drop it: there is no such kernel",
    # data
    "data-impl": "drop it: token files are memory-mapped .bin/.idx pairs",
    "mock-data": "leave --data-path out: the built-in corpus needs no download",
    "tokenizer-type": "drop it: --tokenizer-model tells by its file",
    "vocab-file": "use --tokenizer-model",
    "merge-file": "use --tokenizer-model with a tokenizer.json",
    "num-workers": "drop it: batches are read from a memory map",
    "dataloader-type": "drop it: the order of samples depends on --seed and samples seen only",
    "create-attention-mask-in-dataloader": "drop it: masks are made where they are used",
    "per-split-data-args-path": "use --train-data-path, --valid-data-path and --test-data-path",
    # checkpoints, logs, ends
    "ckpt-format": "drop it: there is one format, which loads at any topology",
    "use-dist-ckpt": "drop it: there is one format, which loads at any topology",
    "no-load-rng": "drop it: nothing here draws random numbers after the start",
    "no-save-optim": "drop it: a checkpoint always holds the optimizer state",
    "exit-on-missing-checkpoint": "drop it: --load of a missing path always ends the run; see --load auto",
    "exit-interval": "use --train-iters",
    "exit-duration-in-mins": "send SIGTERM, as SLURM does: the run saves and leaves",
    "exit-signal-handler": "drop it: SIGTERM always saves and leaves",
    "log-throughput": "drop it: tokens/s and MFU are always in the log",
    "log-timers-to-tensorboard": "drop it: --tensorboard-dir has all metrics",
    "timing-log-level": "drop it: step times are in metrics.jsonl",
    "wandb-project": "use --tensorboard-dir, which wandb sync reads",
}


def instead_of(flag: str) -> str | None:
    """What to do in place of a foreign flag such as `--fp16`; None where it is not known either."""
    return _INSTEAD.get(flag.removeprefix("--").replace("_", "-"))

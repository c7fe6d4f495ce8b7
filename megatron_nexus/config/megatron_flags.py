"""Flags of Megatron-LM, GPT-NeoX and DeepSpeed scripts that mean nothing here, and what takes their place.

Read when a flag is unknown: whoever brings a script along is told what each of its flags became.
"""

_ALWAYS = "drop it: the decoder always has this"
_NEVER = "drop it: the decoder never has this"
_ATTENTION = "drop it: attention runs through PyTorch's scaled_dot_product_attention"
_ONE_CODE = "drop it: there is one implementation"
_EXPERTS = "drop it: mixtures of experts are not offered"
_NO_KERNEL = "drop it: there is no such kernel"
_RECOMPUTE = "drop it: --recompute-granularity full keeps the input of every block"
_ONE_FORMAT = (
    "drop it: there is one format, which loads at any topology; tools/convert_checkpoint.py writes others"
)
_SHARDED = "use --zero-stage 3"
_NO_OFFLOAD = (
    "drop it: offloading is not offered; --zero-stage 3 and --recompute-granularity full save memory"
)
_SCHEDULE = "drop it: flags win over the checkpoint's schedule, which holds where no flag is given"
_NO_RNG = "drop it: nothing here draws random numbers after the start"
_METRICS = "drop it: step times are in metrics.jsonl"
_WANDB = "use --tensorboard-dir, which wandb sync reads"
_BF16 = "use --bf16"
_GARBAGE = "drop it: what the imports make is kept from Python's collector, which finds little more"
_BOS = "give it to tools/preprocess_data.py: a run begins documents as its corpus and its checkpoint do"
_INSTEAD: dict[str, str] = {
    # the model
    "swiglu": "drop it: --feed-forward swiglu is the default",
    "untie-embeddings-and-output-weights": _ALWAYS,
    "disable-bias-linear": _ALWAYS,
    "squared-relu": "drop it: --feed-forward swiglu is the default",
    "use-rotary-position-embeddings": _ALWAYS,
    "use-flash-attn": _ATTENTION,
    "use-fused-attn": _ATTENTION,
    "attention-backend": _ATTENTION,
    "transformer-impl": _ONE_CODE,
    "use-mcore-models": _ONE_CODE,
    "use-legacy-models": _ONE_CODE,
    "spec": "drop it: --preset and the model flags describe the model",
    "position-embedding-type": "drop it: rotary positions are used; --rotary-base sets their base",
    "window-size": "use --sliding-window, which counts the token itself: 1 more than Megatron-LM's left part",
    "window-attn-skip-freq": "drop it: all layers have --sliding-window",
    "rotary-percent": "drop it: all channels of a head are turned",
    "rotary-seq-len-interpolation-factor": "use --rotary-base",
    "max-position-embeddings": "use --seq-length: rotary positions have no table",
    "group-query-attention": "use --num-query-groups alone",
    "attention-dropout": _NEVER,
    "hidden-dropout": _NEVER,
    "multi-latent-attention": _NEVER,
    "mtp-num-layers": _NEVER,
    "apply-layernorm-1p": _NEVER,
    "num-experts": _EXPERTS,
    "expert-model-parallel-size": _EXPERTS,
    "expert-tensor-parallel-size": _EXPERTS,
    "make-vocab-size-divisible-by": "use --padding-multiple: every split axis is padded in memory",
    "layernorm-epsilon": "use --norm-epsilon",
    "init-method-xavier-uniform": "use --init-method-std: weights start as N(0, std^2)",
    # parallelism
    "num-layers-per-virtual-pipeline-stage": "drop it: stages are cut by cost, one piece each",
    "num-virtual-stages-per-pipeline-rank": "drop it: stages are cut by cost, one piece each",
    "decoder-first-pipeline-num-layers": "drop it: stages are cut by cost",
    "decoder-last-pipeline-num-layers": "drop it: stages are cut by cost",
    "pipeline-model-parallel-layout": "drop it: stages are cut by cost",
    "context-parallel-size": "use --sequence-parallel, or --recompute-granularity full, for long samples",
    "use-distributed-optimizer": "use --zero-stage 1",
    "use-torch-fsdp2": _SHARDED,
    "use-megatron-fsdp": _SHARDED,
    "fsdp": _SHARDED,
    "data-parallel-sharding-strategy": "use --zero-stage: 1 optimizer, 2 gradients too, 3 weights too",
    "cpu-offload": _NO_OFFLOAD,
    "optimizer-cpu-offload": _NO_OFFLOAD,
    "overlap-grad-reduce": "use --deepspeed-config with zero_optimization.overlap_comm",
    "overlap-param-gather": "use --deepspeed-config with zero_optimization.overlap_comm",
    "ddp-bucket-size": "use --deepspeed-config with zero_optimization.reduce_bucket_size",
    "no-async-tensor-model-parallel-allreduce": "drop it: collectives are fused instead",
    "tp-comm-overlap": "drop it: collectives are fused instead",
    "distributed-backend": "drop it: NCCL on GPUs, gloo on CPUs",
    "distributed-timeout-minutes": "drop it: ranks notice at once when one ends",
    "deepspeed-activation-checkpointing": "use --recompute-granularity",
    "zero-reduce-scatter": "drop it: ZeRO reduces as DeepSpeed's stage does",
    "no-pipeline-parallel": "use --pp 1",
    "use-cpu-initialization": "drop it: initial weights do not depend on the device or the topology",
    # the step
    "fp16": "use --bf16: fp16 with loss scaling is not offered",
    "fp8-format": _BF16,
    "fp8-hybrid": _BF16,
    "fp8-e4m3": _BF16,
    "fp8-recipe": _BF16,
    "fp8-param-gather": _BF16,
    "main-grads-dtype": "drop it: gradients always accumulate in fp32",
    "loss-scale": "drop it: bf16 needs none",
    "initial-loss-scale": "drop it: bf16 needs none",
    "min-loss-scale": "drop it: bf16 needs none",
    "loss-scale-window": "drop it: bf16 needs none",
    "hysteresis": "drop it: bf16 needs none",
    "accumulate-allreduce-grads-in-fp32": "drop it: gradients always accumulate in fp32",
    "attention-softmax-in-fp32": "drop it: the attention kernel does that",
    "recompute-activations": "use --recompute-granularity selective",
    "checkpoint-activations": "use --recompute-granularity full",
    "recompute-method": _RECOMPUTE,
    "recompute-num-layers": _RECOMPUTE,
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
    "decoupled-min-lr": "drop it: one learning rate for all parameters",
    "start-weight-decay": "use --weight-decay",
    "end-weight-decay": "use --weight-decay",
    "weight-decay-incr-style": "use --weight-decay",
    "sgd-momentum": "drop it: AdamW is used",
    "no-masked-softmax-fusion": _NO_KERNEL,
    "no-gradient-accumulation-fusion": _NO_KERNEL,
    "no-bias-gelu-fusion": _NO_KERNEL,
    "no-bias-swiglu-fusion": _NO_KERNEL,
    "no-bias-dropout-fusion": _NO_KERNEL,
    "no-persist-layer-norm": _NO_KERNEL,
    "cross-entropy-loss-fusion": _NO_KERNEL,
    "empty-unused-memory-level": "drop it: memory is not given back between steps",
    "check-for-nan-in-loss-and-grad": "drop it: a loss or gradient that is not finite always ends the run",
    "no-check-for-nan-in-loss-and-grad": "drop it: a loss or gradient that is not finite always ends the run",
    "no-rope-fusion": _NO_KERNEL,
    "manual-gc": _GARBAGE,
    "manual-gc-interval": _GARBAGE,
    "calculate-per-token-loss": "drop it: the loss is always the mean over all tokens of the batch",
    # data
    "data-impl": "drop it: token files are memory-mapped .bin/.idx pairs",
    "eod-mask-loss": "drop it: every token counts in the loss, the end of a document too",
    "mock-data": "leave --data-path out: the built-in corpus needs no download",
    "no-mmap-bin-files": "drop it: token files are memory-mapped .bin/.idx pairs",
    "no-create-attention-mask-in-dataloader": "drop it: masks are made where they are used",
    "tokenizer-type": "drop it: --tokenizer-model tells by its file",
    "prepend-bos": _BOS,
    "no-prepend-bos": _BOS,
    "vocab-file": "use --tokenizer-model",
    "merge-file": "use --tokenizer-model with a tokenizer.json",
    "tiktoken-pattern": "use --tokenizer-model with a tokenizer.json",
    "num-workers": "drop it: batches are read from a memory map",
    "dataloader-type": "drop it: the order of samples depends on --seed and samples seen only",
    "create-attention-mask-in-dataloader": "drop it: masks are made where they are used",
    "per-split-data-args-path": "use --train-data-path, --valid-data-path and --test-data-path",
    # checkpoints, logs, ends
    "ckpt-format": _ONE_FORMAT,
    "ckpt-convert-format": _ONE_FORMAT,
    "ckpt-convert-save": _ONE_FORMAT,
    "dist-ckpt-format": _ONE_FORMAT,
    "auto-detect-ckpt-format": _ONE_FORMAT,
    "ckpt-fully-parallel-load": _ONE_FORMAT,
    "no-ckpt-fully-parallel-save": _ONE_FORMAT,
    "use-dist-ckpt": _ONE_FORMAT,
    "no-load-rng": _NO_RNG,
    "no-save-rng": _NO_RNG,
    "data-parallel-random-init": _NO_RNG,
    "no-load-optim": "use --reset-optimizer: moments and Adam's count of steps begin anew",
    "finetune": "use --reset-optimizer; the count of steps goes on: raise --train-iters, and --lr-start-iter "
    "begins the schedule anew",
    "save-retain-interval": "use --keep-every",
    "pretrained-checkpoint": "use --load with --reset-optimizer",
    "ckpt-step": "use --load with the checkpoint's folder, such as runs/a/iter_0000100",
    "use-checkpoint-args": "drop it: --load always takes the checkpoint's model and settings",
    "use-checkpoint-opt-param-scheduler": _SCHEDULE,
    "override-opt-param-scheduler": _SCHEDULE,
    "non-persistent-save-interval": "use --save-interval with --async-save and --keep-latest",
    "no-save-optim": "drop it: a checkpoint always holds the optimizer state",
    "exit-on-missing-checkpoint": "drop it: --load of a missing path always ends the run; see --load auto",
    "exit-interval": "use --train-iters",
    "exit-duration-in-mins": "send SIGTERM, as SLURM does: the run saves and leaves",
    "exit-signal-handler": "drop it: a run always saves and exits at the signals of --exit-signal",
    "log-params-norm": "drop it: norms of parameters are not logged, that of the gradient is",
    "log-num-zeros-in-grad": "drop it: zeros are not counted",
    "log-throughput": "drop it: tokens/s and MFU are always in the log",
    "log-progress": "drop it: progress.txt is not written; metrics.jsonl has every step",
    "tensorboard-log-interval": "use --log-interval",
    "tensorboard-queue-size": "use --log-interval",
    "log-memory-to-tensorboard": "drop it: --tensorboard-dir has all metrics",
    "log-validation-ppl-to-tensorboard": "drop it: --tensorboard-dir has all metrics",
    "log-world-size-to-tensorboard": "drop it: --tensorboard-dir has all metrics",
    "log-timers-to-tensorboard": "drop it: --tensorboard-dir has all metrics",
    "timing-log-level": _METRICS,
    "timing-log-option": _METRICS,
    "wandb-project": _WANDB,
    "wandb-exp-name": _WANDB,
    "wandb-save-dir": _WANDB,
    "wandb-entity": _WANDB,
}


_INSTEAD_OF_PREPROCESSING = {
    "tokenizer-type": "drop it: --tokenizer-model tells by its file, a SentencePiece .model or a Hugging "
    "Face tokenizer.json",
    "vocab-file": "use --tokenizer-model with the Hugging Face tokenizer.json of the same vocabulary",
    "merge-file": "use --tokenizer-model with the Hugging Face tokenizer.json, which holds the merges",
    "vocab-size": "drop it: --tokenizer-model has its own",
    "num-workers": "use --workers",
    "partitions": "drop it: the inputs are cut by themselves; --workers or mpirun share them",
    "keep-sequential-samples": "drop it: documents always stand in the order of the inputs",
    "split-sentences": "drop it: a document is one sequence",
    "keep-newlines": "drop it: texts are kept as they are",
    "lang": "drop it: no sentences are split",
    "dataset-impl": "drop it: a .bin/.idx pair is written",
    "json-key": "use --json-keys",
}


def instead_of(flag: str) -> str | None:
    """What to do in place of a foreign flag such as `--fp16`; None where it is not known either."""
    name = _name(flag)
    return _EXPERTS if name.startswith("moe-") else _INSTEAD.get(name)


def instead_of_preprocessing(flag: str) -> str | None:
    """The same for a flag of Megatron-LM's tools/preprocess_data.py."""
    return _INSTEAD_OF_PREPROCESSING.get(_name(flag))


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("_", "-")

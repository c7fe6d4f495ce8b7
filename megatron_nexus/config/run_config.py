"""The configuration of a run: frozen dataclasses, one section for each part of the program that reads it.

Every field states its default, its unit and its flag once, in `config_field(...)`; the command line, its help
and the saved configuration are made from that. Flags are the field's name with dashes, which is
Megatron-LM's spelling where Megatron-LM has the flag, plus the aliases given here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, get_type_hints

from megatron_nexus.base.json_text import fits
from megatron_nexus.config.batch_schedule import BatchSchedule, batch_schedule
from megatron_nexus.config.config_field import config_field
from megatron_nexus.config.files_config import CheckpointConfig, DataConfig, LoggingConfig
from megatron_nexus.config.model_config import INNER_BEFORE_IT_WAS_RECORDED, ModelConfig
from megatron_nexus.config.unlearning_config import UnlearningConfig

Precision = Literal["bf16", "fp32"]
Recompute = Literal["none", "selective", "full"]
DecayStyle = Literal["cosine", "linear", "constant", "WSD"]
MatmulPrecision = Literal["highest", "high"]
AttentionBackend = Literal["auto", "sdpa", "flex"]
CrossEntropyImpl = Literal["native", "linear"]
NormImpl = Literal["torch", "apex"]
OptimizerImpl = Literal["torch", "apex", "deepspeed"]
SpikePolicy = Literal["none", "stop", "skip", "rewind"]

MOST_MINUTES = 31 * 24 * 60
"""The longest that one rank waits for another: a month."""


@dataclass(frozen=True)
class ParallelConfig:
    """How one model is spread over ranks. Data parallelism is what the world size leaves."""

    tensor_model_parallel_size: int = config_field(1, "ranks that share each layer", "--tp", positive=True)
    pipeline_model_parallel_size: int = config_field(1, "pipeline stages", "--pp", positive=True)
    zero_stage: int = config_field(
        1, "ZeRO stage: 0, 1 at any pp; 2, 3 at pp = 1 (0 is served as 1)", maximum=3
    )
    sequence_parallel: bool = config_field(False, "split norms and residual over the tensor-parallel ranks")
    padding_multiple: int = config_field(
        0, "split axes are padded in memory to this multiple per rank; 0: 64 on an accelerator, 1 on a CPU"
    )
    overlap_grad_reduce: bool = config_field(
        True, "reduce gradients while the last micro-batch's backward pass runs, at ZeRO 1; else after it"
    )
    ddp_bucket_size: int = config_field(
        0,
        "parameters in a bucket of --overlap-grad-reduce; 0: 40 million, or a million for each "
        "data-parallel rank where that is more",
    )
    hierarchical_grad_reduce: bool = config_field(
        False, "reduce gradients within each node first, then across nodes, at ZeRO 1"
    )
    deepspeed_config: str = config_field(
        "", "JSON file of DeepSpeed settings, merged with what follows from the flags", "--deepspeed_config"
    )
    distributed_timeout_minutes: int = config_field(
        30,
        "minutes that a rank waits for others at the start, in evaluations and for checkpoints",
        positive=True,
        maximum=MOST_MINUTES,
    )
    distributed_timeout_seconds_after_init: int = config_field(
        300,
        "seconds that a rank waits for others within a step, after the first; 0: as in the first",
        maximum=60 * MOST_MINUTES,
    )
    rank_heartbeat_timeout: int = config_field(
        60,
        "seconds without progress in a step, after the first, at which the run names the rank that hangs and "
        "exits with code 75; three times the longest step where that is more; 0: never",
        maximum=60 * MOST_MINUTES,
    )


@dataclass(frozen=True)
class TrainingConfig:
    """What one optimizer step is, and how many there are."""

    micro_batch_size: int = config_field(8, "samples per rank, forward and backward pass", positive=True)
    global_batch_size: int = config_field(32, "samples per optimizer step over all ranks", positive=True)
    seq_length: int = config_field(128, "tokens per sample", positive=True)
    rampup_batch_size: tuple[str, ...] = config_field(
        (),
        "start, increment, samples: the batch grows from start to --global-batch-size over so many samples",
    )
    train_iters: int = config_field(
        300, "optimizer steps of the whole run, resumed steps included", positive=True
    )
    train_tokens: str = config_field(
        "", "--train-iters by the tokens of the whole run, such as 100B; the last step is a whole one"
    )
    train_samples: int = config_field(0, "--train-iters by the samples of the whole run; 0: it is not")
    precision: Precision = config_field("bf16", "bf16 (fp32 master weights and accumulation) or fp32")
    recompute_granularity: Recompute = config_field(
        "none", "activations computed again in backward: none, selective (pointwise ones), full (each block)"
    )
    compile: bool = config_field(
        False, "compile the blocks with torch.compile; the first step takes about a minute longer"
    )
    deterministic_mode: bool = config_field(
        False,
        "deterministic kernels only: on a GPU a resumed run is bit-identical with it alone; slower there",
        "--deterministic",
    )
    float32_matmul_precision: MatmulPrecision = config_field(
        "highest", "products of float32 matrices on a GPU: highest (IEEE float32) or high (TF32)"
    )
    manual_gc: bool = config_field(
        False, "collect Python's garbage at fixed steps, at the same moment on all ranks, and never between"
    )
    manual_gc_interval: int = config_field(
        1000, "steps between two collections of --manual-gc", positive=True
    )
    attention_backend: AttentionBackend = config_field(
        "auto",
        "with --reset-attention-mask: sdpa with a dense mask, flex (FlexAttention: a GPU and --compile), or "
        "auto: flex where it can be used",
    )
    cross_entropy_fusion_impl: CrossEntropyImpl = config_field(
        "native",
        "native: logits, then their loss; linear: head and loss in one by DeepSpeed, which computes logits "
        "twice and never holds them all: for large vocabularies",
    )
    norm_impl: NormImpl = config_field("torch", "RMSNorm of torch, or of NVIDIA's apex on CUDA devices")
    spike_policy: SpikePolicy = config_field(
        "none",
        "at a spike of loss or gradient norm that a second computation confirms: stop, skip the update, or "
        "rewind to the last good checkpoint and leave out the samples; none: spikes are not looked for",
    )
    spike_sigma_factor: float = config_field(
        6.0, "standard deviations above the mean of recent steps from which a value is a spike", positive=True
    )
    spike_rolling_interval: int = config_field(
        128, "recent steps of that mean; spikes are looked for once there are half as many", positive=True
    )
    check_weight_hash_across_dp_replicas_interval: int = config_field(
        0,
        "steps between comparisons of the weights that several ranks hold alike; 0: never",
    )
    seed: int = config_field(1234, "seed of the initial weights and of the order of samples")

    @property
    def product_precision(self) -> str:
        """In which products of matrices are computed on a GPU: "bf16", "tf32" or "fp32"."""
        return (
            "tf32" if (self.precision, self.float32_matmul_precision) == ("fp32", "high") else self.precision
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = config_field(3e-4, "peak learning rate", positive=True)
    min_lr: float = config_field(3e-5, "learning rate at the end of the decay")
    lr_decay_style: DecayStyle = config_field(
        "cosine", "cosine, linear, constant or WSD (warm-up, stable, decay)"
    )
    lr_decay_iters: int = config_field(0, "step at which the decay ends; 0: the last step")
    lr_start_iter: int = config_field(
        0, "step that warm-up and decay are counted from, for a new phase of a run"
    )
    lr_warmup_iters: int = config_field(0, "steps of linear warm-up from zero")
    lr_wsd_decay_iters: int = config_field(0, "steps of the final decay of WSD; 0: a tenth of the run")
    lr_decay_samples: int = config_field(0, "samples at which the decay ends; 0: the last of the run")
    lr_warmup_samples: int = config_field(
        0, "samples of linear warm-up; one of these has the schedule count samples"
    )
    lr_wsd_decay_samples: int = config_field(0, "samples of the final decay of WSD; 0: a tenth of the run")
    new_lr_ratio: float = config_field(
        1.0,
        "learning rate of the weights of the run's last growth, as a multiple of the others'",
        positive=True,
    )
    new_lr_warmup_iters: int = config_field(
        0, "steps since its last growth over which a run's new weights warm up to that, from zero"
    )
    weight_decay: float = config_field(0.1, "decoupled weight decay of matrices; norm gains have none")
    adam_beta1: float = config_field(0.9, "decay of the first moment", below=1)
    adam_beta2: float = config_field(0.95, "decay of the second moment", below=1)
    adam_eps: float = config_field(1e-8, "epsilon of Adam", positive=True)
    clip_grad: float = config_field(1.0, "largest global gradient norm; 0 clips nothing")
    optimizer_impl: OptimizerImpl = config_field(
        "torch",
        "AdamW of torch (fused), of NVIDIA's apex (CUDA devices), or of DeepSpeed (compiled at first use)",
    )

    @property
    def has_new_lr(self) -> bool:
        """Whether the weights of the last growth have a learning rate of their own."""
        return self.new_lr_ratio != 1.0 or self.new_lr_warmup_iters > 0

    @property
    def counts_samples(self) -> bool:
        """Whether the learning rate is a function of the samples read, not of the steps taken."""
        return bool(self.lr_decay_samples or self.lr_warmup_samples or self.lr_wsd_decay_samples)

    @property
    def lr_spans(self) -> tuple[int, int, int]:
        """Warm-up, end of the decay and length of the final decay of WSD, in samples or steps."""
        if self.counts_samples:
            return self.lr_warmup_samples, self.lr_decay_samples, self.lr_wsd_decay_samples
        return self.lr_warmup_iters, self.lr_decay_iters, self.lr_wsd_decay_iters


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does."""

    preset: str
    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    unlearning: UnlearningConfig = UnlearningConfig()

    @property
    def verb(self) -> str:
        """The verb of the command that runs it."""
        return "unlearn" if self.unlearning.is_on else "train"

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: tensor x pipeline."""
        return self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Return the copies of the model among `world_size` ranks, a multiple by the rules."""
        return world_size // self.model_parallel_size

    @property
    def batches(self) -> BatchSchedule:
        """The global batch of each step. Raises ConfigError on a --rampup-batch-size that cannot be meant."""
        return batch_schedule(self.training.rampup_batch_size, self.training.global_batch_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro-batches per rank and optimizer step of a full batch."""
        per_pass = self.training.micro_batch_size * self.data_parallel_size(world_size)
        return self.training.global_batch_size // per_pass

    @classmethod
    def from_dict(cls, saved: Mapping[str, object]) -> Self:
        """Return the configuration that a checkpoint holds as JSON.

        Raises KeyError or TypeError where a section is missing or a value has the wrong type.
        """
        sections = {}
        for section, kind in ALL_SECTIONS.items():
            values = saved[section] if section in SECTIONS else saved.get(section, {})
            if not isinstance(values, dict):
                raise TypeError(f"{section} is not a section")
            if section == "model" and values.get("attention_order", 1) != 1:
                values = {"attention_inner": INNER_BEFORE_IT_WAS_RECORDED, **values}
            for name, hint in get_type_hints(kind).items():
                if name in values and not fits(values[name], hint):
                    raise TypeError(f"{section}.{name} is {values[name]!r:.80}")
            # JSON has lists for our tuples.
            sections[section] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        return cls(preset=str(saved["preset"]), **sections)


ALL_SECTIONS: dict[str, type] = {
    name: kind for name, kind in get_type_hints(RunConfig).items() if name != "preset"
}
SECTIONS: dict[str, type] = {name: kind for name, kind in ALL_SECTIONS.items() if name != "unlearning"}
"""Those of `nexus train`; `nexus unlearn` has them all."""

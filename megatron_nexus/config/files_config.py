"""Sections of a run's configuration about files: the data, the checkpoints, what is logged and evaluated."""

from dataclasses import dataclass
from typing import Literal

from megatron_nexus.config.config_field import config_field
from megatron_nexus.config.exit_signals import DEFAULT_EXIT_SIGNALS

TimingLogOption = Literal["max", "minmax", "all"]


def split_names(text: str) -> tuple[str, ...]:
    """Return the names between commas, each once."""
    return tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    data_path: tuple[str, ...] = config_field(
        (), "prefix of a .bin/.idx pair, or a blend: 0.7 a 0.3 b; empty: the built-in corpus of this Python"
    )
    train_data_path: tuple[str, ...] = config_field(
        (), "in place of --data-path: a prefix or a blend of which everything is trained on"
    )
    valid_data_path: tuple[str, ...] = config_field(
        (), "validation data in place of --split's share: a prefix, a blend, or sets by name: web=a code=b"
    )
    test_data_path: tuple[str, ...] = config_field(
        (), "data that a finished run is tested on once, as --valid-data-path"
    )
    tokenizer_model: str = config_field(
        "", "of the corpus: SentencePiece .model, tokenizer.json or its folder; empty: built-in"
    )
    split: str = config_field(
        "969,30,1", "shares of --data-path's documents for training, validation and test"
    )
    data_range: str = config_field(
        "", "tokens of the training data that this run reads, such as 100B:130B; of a blend its share each"
    )
    reset_position_ids: bool = config_field(False, "positions count from 0 in each document of a sample")
    reset_attention_mask: bool = config_field(False, "tokens attend within their document of a sample only")
    data_cache_path: str = config_field("", "cache of the built-in corpus; empty: the user's cache folder")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    save: str = config_field(
        "", "folder of the run's checkpoints; empty: runs/<preset>-<date>-<time>, or --load's"
    )
    load: str = config_field(
        "", "a run's folder or one checkpoint in it; auto: the newest complete one, or start fresh"
    )
    grow: str = config_field(
        "", 'sizes to grow the loaded model to, as in "nexus_m=1088 nexus_a=1228"; new weights as init=...'
    )
    reset_optimizer: bool = config_field(
        False, "load weights only: moments and Adam's step count start at zero"
    )
    save_interval: int = config_field(0, "steps between checkpoints; 0: only at the end and on Ctrl-C")
    async_save: bool = config_field(
        False, "write the checkpoints of --save-interval while training continues, from a copy in host memory"
    )
    ckpt_files_per_node: int = config_field(
        1, "data files of a checkpoint that the ranks of a node write, each its part of one", positive=True
    )
    keep_latest: int = config_field(0, "newest checkpoints to keep, older ones are deleted; 0: all are kept")
    keep_every: int = config_field(
        0, "checkpoints of the multiples of this number of steps are kept for good; 0: none are"
    )
    exit_signal: tuple[str, ...] = config_field(
        DEFAULT_EXIT_SIGNALS, "signals at which the run saves a checkpoint and exits"
    )
    exit_duration_in_mins: float = config_field(
        0.0, "minutes after its start at which the run saves a checkpoint and exits; 0: never"
    )


@dataclass(frozen=True)
class LoggingConfig:
    """What the run logs, and how often."""

    log_interval: int = config_field(
        10, "steps between lines on the console; longer steps have one every 5 s", positive=True
    )
    timing_log_level: int = config_field(
        0,
        "times of the phases of a step at --log-interval: 0 none, 1 forward-backward, gradient reduction and "
        "optimizer, 2 all phases; waits for no device",
        maximum=2,
    )
    timing_log_option: TimingLogOption = config_field(
        "minmax", "of these times over the ranks: max, minmax, or all: of every rank"
    )
    straggler_threshold: float = config_field(
        1.5,
        "at --log-interval the rank is named that computes this many times as long as the median one; 0: "
        "none is",
    )
    log_dir: str = config_field(
        "", "folder of rank_0.log, rank_1.log, ...: the messages and the error of each rank; empty: none"
    )
    profile: bool = config_field(False, "trace steps with torch.profiler into the run's folder")
    profile_step_start: int = config_field(10, "first step that --profile traces", positive=True)
    profile_step_end: int = config_field(12, "step at which --profile ends; it is not traced", positive=True)
    profile_ranks: tuple[str, ...] = config_field(("0",), "ranks that --profile traces")
    use_pytorch_profiler: bool = config_field(
        True, "of --profile; without, cudaProfilerStart and Stop for nsys --capture-range=cudaProfilerApi"
    )
    record_memory_history: bool = config_field(
        False, "record CUDA's allocations on --profile-ranks, and write them every --log-interval steps"
    )
    memory_snapshot_path: str = config_field(
        "snapshot.pickle", "file of --record-memory-history; _rank_N is added to its name"
    )
    eval_interval: int = config_field(100, "steps between validations; 0: only at the end")
    eval_iters: int = config_field(8, "global batches per validation; 0: no validation")
    eval_tasks: str = config_field(
        "", "tasks of lm-evaluation-harness to score, with commas between them; rank 0 needs the extra eval"
    )
    eval_tasks_interval: int = config_field(
        0, "steps between evaluations of --eval-tasks; 0: only at the end"
    )
    eval_task_path: str = config_field(
        "", "folder of the tasks' records, such as piqa.jsonl; empty: the published ones are fetched"
    )
    eval_tasks_limit: int = config_field(0, "items of each task, the first ones; 0: all")
    growth_metrics_interval: int = config_field(
        0,
        "steps between growth metrics: gradients, updates, activations and ranks of new weights against old "
        "ones; 0: none",
    )
    tensorboard_dir: str = config_field("", "folder of TensorBoard event files; empty: none are written")
    wandb_project: str = config_field("", "project of Weights & Biases to log to; empty: none")
    wandb_exp_name: str = config_field("", "name of the run there; empty: Weights & Biases makes one up")
    wandb_entity: str = config_field("", "user or team that owns the project; empty: your default")
    wandb_save_dir: str = config_field("", "folder of what is kept here of it; empty: the run's")
    mlflow_experiment: str = config_field("", "experiment of MLflow to log to; empty: none")
    mlflow_run_name: str = config_field("", "name of the run there; empty: MLflow makes one up")
    mlflow_tracking_uri: str = config_field(
        "", "address of MLflow's server, or sqlite:///FILE; empty: MLFLOW_TRACKING_URI of the environment"
    )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks of `eval_tasks`, each once."""
        return split_names(self.eval_tasks)

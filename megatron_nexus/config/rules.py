"""The rules between fields: every problem of a configuration, each with value, rule and remedy.

Pure arithmetic over the configuration and the world size, so that it runs before anything is started.
"""

from collections.abc import Iterable

from megatron_nexus.config.config_field import MOST, bound_problems
from megatron_nexus.config.data_path import parse_blend, parse_sets, parse_token_range
from megatron_nexus.config.deepspeed_config import deepspeed_config
from megatron_nexus.config.exit_signals import parse_exit_signals
from megatron_nexus.config.model_rules import divisors, model_problems
from megatron_nexus.config.profile import profile_problems
from megatron_nexus.config.run_config import ALL_SECTIONS, RunConfig
from megatron_nexus.errors import ConfigError, raise_problems

MOST_ELEMENTS = 2**59
"""Most elements of all weights or of a layer's activations: 16 bytes of each are counted in 64 bits."""


def check(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError with every problem of `config` on `world_size` ranks."""
    sections = [getattr(config, name) for name in ALL_SECTIONS]
    bounds = [problem for section in sections for problem in bound_problems(section)]
    numbers = [value for section in sections for value in vars(section).values() if isinstance(value, int)]
    if world_size > MOST:
        bounds.append(f"--world-size {world_size} must be at most {MOST:,}: give a smaller number")
    # What follows computes with them.
    if max(map(abs, [*numbers, world_size])) > MOST:
        raise ConfigError(bounds)
    if excessive := [*_excessive_products(config)]:
        raise ConfigError([*bounds, *excessive])
    problems = [
        *bounds,
        *model_problems(config),
        *_optimizer_problems(config),
        *_topology_problems(config, world_size),
        *_step_problems(config),
        *_data_problems(config),
        *profile_problems(config, world_size),
        *_batch_problems(config, world_size),
        *_task_problems(config),
        *_unlearning_problems(config),
    ]
    if not problems:
        deepspeed_config(config, world_size)
    raise_problems(problems)


def check_topology(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError where `world_size` ranks cannot hold the model as `config.parallel` says."""
    problems = [*bound_problems(config.parallel), *_topology_problems(config, world_size)]
    raise_problems(problems)


def config_warnings(config: RunConfig) -> Iterable[str]:
    """Yield what is allowed and probably not meant."""
    model = config.model
    if model.has_nexus and not model.hidden_size < model.nexus_m < model.nexus_a:
        yield (
            f"D < M < A does not hold: --hidden-size {model.hidden_size}, --nexus-m {model.nexus_m}, "
            f"--nexus-a {model.nexus_a}; a Nexus-Rank projection is meant to widen"
        )
    optimizer = config.optimizer
    unit, counted_in, end = "iters", "iterations", config.training.train_iters
    if optimizer.counts_samples:
        unit, counted_in, end = "samples", "samples", config.batches.samples(0, end)
    warmup, decay, wsd = optimizer.lr_spans
    if optimizer.lr_start_iter + warmup >= end:
        counted = f", from --lr-start-iter {optimizer.lr_start_iter} on," if optimizer.lr_start_iter else ""
        yield f"--lr-warmup-{unit} {warmup}{counted} is not over when the run of {end} {counted_in} ends"
    if config.parallel.hierarchical_grad_reduce and config.parallel.zero_stage > 1:
        yield (
            f"--hierarchical-grad-reduce has no effect at --zero-stage {config.parallel.zero_stage}, where "
            "DeepSpeed reduces the gradients: drop the flag, or use --zero-stage 1"
        )
    if config.parallel.ddp_bucket_size and config.parallel.zero_stage > 1:
        yield (
            f"--ddp-bucket-size {config.parallel.ddp_bucket_size} has no effect at --zero-stage "
            f"{config.parallel.zero_stage}: use zero_optimization.reduce_bucket_size of --deepspeed-config"
        )
    if 0 < decay <= optimizer.lr_start_iter + warmup:
        start = f" --lr-start-iter {optimizer.lr_start_iter} and" if optimizer.lr_start_iter else ""
        yield (
            f"--lr-decay-{unit} {decay} ends no later than{start} --lr-warmup-{unit} {warmup}: the learning "
            "rate falls to --min-lr right after its warm-up"
        )
    if wsd and optimizer.lr_decay_style != "WSD":
        yield (
            f"--lr-wsd-decay-{unit} {wsd} has no effect with --lr-decay-style {optimizer.lr_decay_style}: "
            "give --lr-decay-style WSD, or drop the flag"
        )


def _excessive_products(config: RunConfig) -> Iterable[str]:
    model, training = config.model, config.training
    widths = (
        *(model.hidden_size, model.attention_width, model.ffn_hidden_size, model.ffn_nexus_m),
        *(model.nexus_m, model.nexus_a, model.pattention_slots),
    )
    *others, widest = sorted(widths)  # no matrix has the same width twice
    tokens = training.global_batch_size * training.seq_length
    products = {
        "--num-layers x the widths of the model": 2 * model.vocab_size * model.hidden_size
        + model.num_layers * widest * sum(others),
        "--micro-batch-size x --seq-length x the widths of the model": training.micro_batch_size
        * training.seq_length
        * max(model.vocab_size, widest),
        "--train-iters x --global-batch-size x --seq-length": training.train_iters * tokens,
        "--eval-iters x --global-batch-size x --seq-length": config.logging.eval_iters * tokens,
    }
    for name, product in products.items():
        if product > MOST_ELEMENTS:
            yield f"{name}: {product:.1e} is beyond {MOST_ELEMENTS:.1e}, the most to count with: give less"


def _optimizer_problems(config: RunConfig) -> Iterable[str]:
    optimizer = config.optimizer
    if config.checkpoint.keep_every > 0 and config.checkpoint.keep_latest == 0:
        yield (
            f"--keep-every {config.checkpoint.keep_every} excepts checkpoints from deletion, and without "
            "--keep-latest none is deleted: give --keep-latest too, or drop the flag"
        )
    in_steps = (
        *(optimizer.lr_decay_iters, optimizer.lr_warmup_iters),
        *(optimizer.lr_wsd_decay_iters, optimizer.lr_start_iter),
    )
    if optimizer.counts_samples and any(in_steps):
        yield (
            "the schedule is given in samples (--lr-decay-samples, --lr-warmup-samples, "
            "--lr-wsd-decay-samples) and in steps: give all of it in one of them"
        )
    if 0 < optimizer.lr < optimizer.min_lr:
        yield f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}: use at most {optimizer.lr}"


def _topology_problems(config: RunConfig, world_size: int) -> Iterable[str]:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if min(tp, pp, model.num_attention_heads, model.num_layers, config.training.seq_length) < 1:
        return  # said already, and the arithmetic below needs sizes
    if model.num_attention_heads % tp:
        yield (
            f"--tp {tp} does not divide --num-attention-heads {model.num_attention_heads}: "
            f"use {divisors(model.num_attention_heads)}"
        )
    elif model.query_groups > 0 and model.query_groups % tp:
        yield (
            f"--tp {tp} does not divide --num-query-groups {model.query_groups}: "
            f"use {divisors(model.query_groups)}"
        )
    if pp > model.num_layers:
        yield (
            f"--pp {pp} is more than --num-layers {model.num_layers}, each stage needs a layer: "
            f"use at most {model.num_layers}"
        )
    if parallel.zero_stage in (2, 3) and pp > 1:
        yield (
            f"--zero-stage {parallel.zero_stage} needs --pp 1, and --pp is {pp}: "
            "use --zero-stage 1, or --pp 1"
        )
    if parallel.sequence_parallel and tp == 1:
        yield "--sequence-parallel splits tokens over tensor-parallel ranks, and --tp is 1: drop the flag"
    if parallel.sequence_parallel and config.training.seq_length % tp:
        yield (
            f"--seq-length {config.training.seq_length} is not a multiple of --tp {tp}, which "
            f"--sequence-parallel needs: use {config.training.seq_length // tp * tp or tp}"
        )
    if world_size % (tp * pp):
        yield (
            f"the world has {world_size} rank{'s' if world_size > 1 else ''}, which is not a multiple of "
            f"--tp {tp} x --pp {pp} = {tp * pp}: "
            f"start {max(1, world_size // (tp * pp)) * tp * pp} ranks or change --tp and --pp"
        )


def _step_problems(config: RunConfig) -> Iterable[str]:
    parallel = config.parallel
    if parallel.zero_stage == 3 and config.training.compile:
        yield (
            "--compile needs the weights of a whole block at once, and --zero-stage 3 gathers them module by "
            "module: drop --compile, or use --zero-stage 1 or 2"
        )
    if parallel.zero_stage == 3 and config.training.cross_entropy_fusion_impl == "linear":
        yield (
            "--cross-entropy-fusion-impl linear reads the head's weights outside of its layer, where "
            "--zero-stage 3 does not gather them: use native, or --zero-stage 1 or 2"
        )
    if config.unlearning.is_on and config.training.cross_entropy_fusion_impl == "linear":
        yield (
            "--cross-entropy-fusion-impl linear has no logits, and the losses of unlearning read them: use "
            "native"
        )
    hashes = config.training.check_weight_hash_across_dp_replicas_interval
    if parallel.zero_stage == 3 and hashes > 0:
        yield (
            f"--check-weight-hash-across-dp-replicas-interval {hashes} compares copies of weights, and at "
            "--zero-stage 3 there are none: drop it, or use --zero-stage 0 to 2"
        )
    if config.training.spike_policy != "none" and config.training.spike_rolling_interval < 2:
        yield (
            f"--spike-rolling-interval {config.training.spike_rolling_interval} has no standard deviation: "
            "give 2 or more, such as 128"
        )
    if config.training.spike_policy == "rewind" and not (
        config.checkpoint.save_interval or config.checkpoint.load
    ):
        yield (
            "--spike-policy rewind goes back to the last checkpoint, and --save-interval 0 leaves none "
            "before the end: give --save-interval such as 500, or use --spike-policy skip"
        )
    if parallel.zero_stage == 3 and config.optimizer.optimizer_impl == "apex":
        yield (
            "--optimizer-impl apex counts its steps by parameter group, and --zero-stage 3 cuts groups up: "
            "use --optimizer-impl torch or deepspeed, or --zero-stage 1 or 2"
        )


def _data_problems(config: RunConfig) -> Iterable[str]:
    data = config.data
    readings = (
        lambda: parse_blend("--data-path", data.data_path),
        lambda: parse_blend("--train-data-path", data.train_data_path),
        lambda: parse_sets("--valid-data-path", "validation", data.valid_data_path),
        lambda: parse_sets("--test-data-path", "test", data.test_data_path),
        lambda: parse_token_range(data.data_range) if data.data_range else None,
        lambda: parse_exit_signals(config.checkpoint.exit_signal),
        lambda: config.batches if config.training.global_batch_size > 0 else None,
    )
    for read in readings:
        try:
            read()
        except ConfigError as error:
            yield from error.problems
    if data.data_path and data.train_data_path:
        yield "--data-path and --train-data-path both name what is trained on: drop one of them"
    if data.train_data_path and not data.valid_data_path and config.logging.eval_iters:
        yield (
            "--train-data-path keeps nothing back for validation: give --valid-data-path too, or "
            "--eval-iters 0"
        )
    given = data.data_path or data.train_data_path
    for flag, value in {
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
    }.items():
        if value and not given:
            yield f"{flag} belongs to a --data-path of the same tokens: give both, or neither"


def _batch_problems(config: RunConfig, world_size: int) -> Iterable[str]:
    training = config.training
    ranks = config.model_parallel_size
    if min(ranks, training.micro_batch_size, training.global_batch_size) < 1 or world_size % ranks:
        return  # said already
    dp = config.data_parallel_size(world_size)
    per_pass = training.micro_batch_size * dp
    if training.global_batch_size % per_pass:
        below = training.global_batch_size // per_pass * per_pass
        choices = f"{below} or {below + per_pass}" if below else f"{per_pass}"
        yield (
            f"--global-batch-size {training.global_batch_size} is not a multiple of micro batch "
            f"{training.micro_batch_size} x data parallel {dp} = {per_pass}: use {choices}"
        )
    elif training.rampup_batch_size:
        try:
            batches = config.batches
        except ConfigError:
            return  # said already
        if batches.start % per_pass or batches.increment % per_pass:
            yield (
                f"--rampup-batch-size {' '.join(training.rampup_batch_size)}: start and increment must be "
                f"multiples of micro batch {training.micro_batch_size} x data parallel {dp} = {per_pass}: "
                f"use such as {per_pass} {per_pass} {batches.ramp_samples}"
            )


def _task_problems(config: RunConfig) -> Iterable[str]:
    log_config, data = config.logging, config.data
    for flag, value in {
        "--eval-tasks-interval": max(0, log_config.eval_tasks_interval),
        "--eval-task-path": log_config.eval_task_path,
        "--eval-tasks-limit": max(0, log_config.eval_tasks_limit),
    }.items():
        if value and not log_config.task_names:
            yield f"{flag} {value} belongs to --eval-tasks, and there are none: give both, or neither"
    if log_config.eval_tasks and not log_config.task_names:
        yield f"--eval-tasks {log_config.eval_tasks!r} names no task: give names, with commas between them"
    if log_config.task_names and (data.data_path or data.train_data_path) and not data.tokenizer_model:
        yield (
            f"--eval-tasks {log_config.eval_tasks} are texts, and the data comes without its tokenizer: give "
            "the tokenizer that it was written with as --tokenizer-model"
        )


def _unlearning_problems(config: RunConfig) -> Iterable[str]:
    unlearning, training = config.unlearning, config.training
    if not unlearning.is_on:
        return
    if unlearning.loss == "graddiff" and unlearning.retain_loss != "gdr":
        yield (
            f"--loss graddiff is ga with --retain-loss gdr, not {unlearning.retain_loss}: use --loss ga, or "
            "drop --retain-loss"
        )
    if unlearning.loss == "graddiff" and not unlearning.retain:
        yield (
            "--loss graddiff has a loss of samples to retain: give them as --retain, or use --loss ga "
            "--retain-loss none"
        )
    elif unlearning.retain_loss != "none" and not unlearning.retain:
        yield (
            f"--retain-loss {unlearning.retain_loss} is of samples to retain: give them as --retain, or "
            "--retain-loss none"
        )
    if unlearning.retain_loss == "none" and unlearning.retain:
        yield (
            f"--retain {unlearning.retain} has no loss with --retain-loss none: drop it, or use gdr or klr"
        )
    sizes = (training.global_batch_size, training.micro_batch_size)
    if min(sizes) > 0 and training.global_batch_size % unlearning.sides:
        yield (
            f"--global-batch-size {training.global_batch_size} is odd, and half of it is of the forget set, "
            f"half of the retain set: use {training.global_batch_size + 1}"
        )
    if training.train_tokens:
        yield (
            f"--train-tokens {training.train_tokens}: answers have lengths of their own: give --train-iters "
            "or --train-samples"
        )
    for flag, wrong in {
        "--spike-policy rewind": training.spike_policy == "rewind",
        "--rampup-batch-size": bool(training.rampup_batch_size),
        "--growth-metrics-interval": config.logging.growth_metrics_interval > 0,
    }.items():
        if wrong:
            yield f"{flag} belongs to pretraining, and this run unlearns: drop it"

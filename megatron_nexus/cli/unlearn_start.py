"""Where an unlearning run starts: at the checkpoint of another run, or at one of its own.

Checkpoints of the run in --save, or --load alone, continue it; another --save begins a new one.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import fields

from megatron_nexus.checkpoint.location import Location, location
from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.checkpoint.saved_run import SavedRun, open_saved_run
from megatron_nexus.config.command_line import LENGTHS
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.files_config import DataConfig
from megatron_nexus.config.presets import Value
from megatron_nexus.config.run_config import OptimizerConfig, RunConfig
from megatron_nexus.config.unlearning_config import UnlearningConfig
from megatron_nexus.errors import ConfigError, raise_problems

UNREAD = (
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_range", "split"),
    *("reset_position_ids", "reset_attention_mask", "new_lr_ratio", "new_lr_warmup_iters"),
)
"""Settings of `train` alone: of its data, and of weights that a growth has added."""
_DEFAULTS = {field.name: field.default for kind in (DataConfig, OptimizerConfig) for field in fields(kind)}


def find_start(given: Mapping[str, Value]) -> tuple[SavedRun, bool]:
    """Return the checkpoint that an unlearning run starts from, and whether the run begins there.

    Raises ConfigError or CheckpointError where the flags name none.
    """
    load, save = str(given.get("load", "")), str(given.get("save", ""))
    unread = [name for name in UNREAD if given.get(name, _DEFAULTS[name]) != _DEFAULTS[name]]
    if given.get("grow"):
        unread.append("grow")
    if unread:
        raise ConfigError(
            [
                f"{flag_of(name)} belongs to the verb train, unlearn reads --forget and --retain: drop it"
                for name in unread
            ]
        )
    if not load or (load == "auto" and not save):
        raise ConfigError("unlearn needs a trained model: give its run as --load, and a new --save")
    own = newest_checkpoint(location(save)) if save else None
    saved = open_saved_run(own) if own else None
    if saved is not None and saved.config.unlearning.is_on and _continues(saved, load):
        return saved, False
    if load == "auto":
        raise ConfigError(
            f"--load auto finds no unlearning run in --save {save}: name the trained model as --load"
        )
    source = open_saved_run(location(load))
    if not save and source.config.unlearning.is_on:
        return source, False
    if not save:
        raise ConfigError("unlearn begins a new run: give a new folder as --save")
    return source, True


def _continues(saved: SavedRun, load: str) -> bool:
    """Return whether a checkpoint in --save is of the run that --load names, or of one that began there."""
    if load == "auto":
        return True
    named = location(load).resolve()
    began = next(str(entry["parent"]) for entry in reversed(saved.manifest.lineage) if "unlearning" in entry)
    own: Location = saved.checkpoint.parent.resolve()
    return str(named) in (began, began.rpartition("/")[0], str(own))


def check_not_unlearned(saved: SavedRun | None, config: RunConfig) -> None:
    """Raise ConfigError where `train` would go on in the folder of an unlearning run, on other data."""
    if saved is None or config.unlearning.is_on or not saved.config.unlearning.is_on:
        return
    run, save = saved.checkpoint.parent, config.checkpoint.save
    in_its_folder = location(save).resolve() == run.resolve() if save else not config.checkpoint.grow
    if in_its_folder:
        raise ConfigError(
            f"--load {config.checkpoint.load}: {run} is an unlearning run, which train does not continue: "
            "use the verb unlearn, or give another --save to pretrain its model"
        )


def base_of(saved: RunConfig, begins: bool, given: Mapping[str, Value]) -> RunConfig:
    """Return the configuration that the flags of an unlearning run change.

    One that begins takes the model, the batch and the tokenizer of the run that it starts from, not its
    schedule: the learning rate is constant unless flags say otherwise.

    Raises ConfigError: a run that begins has no length or learning rate, one that goes on has other losses.
    """
    if not begins:
        _check_same(saved.unlearning, given)
        return saved
    problems = [
        f"an unlearning run has {what} of its own, not pretraining's: give {flag}, such as {flag} {example}"
        for what, flag, example, is_given in (
            ("a learning rate", "--lr", "1e-5", "lr" in given),
            ("a length", "--train-iters", "50", given.keys() & LENGTHS.keys()),
            ("samples", "--forget", "forget.jsonl", given.get("forget")),
        )
        if not is_given
    ]
    raise_problems(problems)
    old = saved.optimizer
    kept = ("weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "optimizer_impl")
    optimizer = OptimizerConfig(
        **{name: getattr(old, name) for name in kept}, min_lr=0.0, lr_decay_style="constant"
    )
    data = DataConfig(tokenizer_model=saved.data.tokenizer_model, data_cache_path=saved.data.data_cache_path)
    training = dataclasses.replace(saved.training, rampup_batch_size=(), spike_policy="none")
    return dataclasses.replace(
        saved, optimizer=optimizer, data=data, training=training, unlearning=UnlearningConfig()
    )


def _check_same(unlearning: UnlearningConfig, given: Mapping[str, Value]) -> None:
    """Raise ConfigError where flags give a run that goes on another loss; its files may have moved."""
    clashes = [
        f"{flag_of(name)} {given[name]} is not the run's {value}: drop the flag, or begin another run with "
        "another --save"
        for name, value in dataclasses.asdict(unlearning).items()
        if name not in ("forget", "retain") and given.get(name, value) != value
    ]
    raise_problems(clashes)

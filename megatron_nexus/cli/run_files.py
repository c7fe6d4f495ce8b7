"""The files of a run, before its ranks import torch: what it reads is opened, where it writes is checked."""

from pathlib import Path

from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.run_dir import check_save_folder
from megatron_nexus.cli.train_command import TrainCommand
from megatron_nexus.data.run_data import RunData, tokenizer_path, training_sources
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.unlearning_samples import UnlearningSamples, read_unlearning_samples
from megatron_nexus.errors import ConfigError, DataError
from megatron_nexus.evaluation.task_files import require_tasks
from megatron_nexus.parallel.world import World


def open_files(command: TrainCommand, world: World) -> RunData | UnlearningSamples | None:
    """Open the data that a run reads, and check the folder it will write.

    Returns None where it reads the built-in corpus, which is prepared later. Raises ConfigError, DataError.
    """
    config = command.config
    run_data: RunData | UnlearningSamples | None = None
    if world.rank == 0 and config.logging.eval_tasks:
        folder = config.logging.eval_task_path
        require_tasks(config.logging.task_names, Path(folder) if folder else None)
    sources = training_sources(config.data)
    if config.unlearning.is_on:
        run_data = read_unlearning_samples(config, command.tokenizer_record)
        assert command.start is not None, "unlearn has --load"
        if (
            not command.start.begins_unlearning
            and command.start.manifest.data.fingerprint != run_data.fingerprint
        ):
            raise DataError(
                f"--forget {config.unlearning.forget} or --retain {config.unlearning.retain}: not the "
                f"samples, --seed or --seq-length that {command.checkpoint} was unlearned with: give "
                "those, or begin another run with another --save"
            )
    elif sources:
        run_data = RunData(config, sources, tokenizer_path(config.data))
        run_data.require_tokenizer(command.tokenizer_record)
    elif tokenizer_path(config.data) is not None:
        find_tokenizer(config, command.tokenizer_record)
    elif command.start and not command.tokenizer_record.fingerprint:
        raise DataError(
            f"{command.checkpoint} knows no tokenizer, and the ids of the built-in corpus would mean "
            "something else to its model: give the tokenizer that it was trained with as --tokenizer-model, "
            "or token files of that as --data-path"
        )
    # On each machine: launchers of other machines would wait for a rank 0 that was refused.
    if world.local_rank == 0 and config.checkpoint.save:
        # A grown model is another run than the checkpoint's, and so is one that begins to unlearn.
        save, grow = location(config.checkpoint.save), config.checkpoint.grow
        if grow and command.checkpoint and save.resolve() == command.checkpoint.parent.resolve():
            raise ConfigError(f"--save {save} is the run that --grow enlarges: give another --save")
        begins = grow or (command.start and command.start.begins_unlearning)
        check_save_folder(save, None if begins else command.checkpoint)
    return run_data

"""The command that trains on from a checkpoint that a verb has written."""

import shlex

from megatron_nexus.base.invocation import command_words, program_words
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.run_data import training_sources
from megatron_nexus.log import logger


def train_command(*flags: str, ranks: int = 1) -> str:
    """Return the command that trains with `flags` on `ranks` ranks, spelt as this process was started."""
    devices = ["--num_gpus", str(ranks)] if ranks > 1 else []
    program = program_words("train")
    if len(program) == 1:
        launch = ["deepspeed", *devices, *program]
    elif devices:
        launch = [*command_words("launch"), *devices, "train"]
    else:
        launch = command_words("train")
    return shlex.join([*launch, *flags])


def log_next_command(command: str, config: RunConfig, knows_tokenizer: bool) -> None:
    """Log the command that trains on from a checkpoint, and what must be added where no tokens are known."""
    if knows_tokenizer or training_sources(config.data) or config.data.tokenizer_model:
        logger.info("  continue with  %s", command)
    else:
        logger.info(
            "to continue, add the tokenizer of the model (--tokenizer-model) or token files of it "
            "(--data-path) to  %s",
            command,
        )

"""How this process was started, and so how a user starts any verb of the command.

    nexus grow ...                              the installed command
    python -m megatron_nexus grow ...           the module
    python tools/grow_sharded_checkpoint.py     a file of the repository

Every message that names a command asks here.
"""

import os
import re
import shlex
import sys
from pathlib import Path

COMMAND = "nexus"
PACKAGE = "megatron_nexus"
FILES = {
    "train": "pretrain_nexus.py",
    "grow": "tools/grow_sharded_checkpoint.py",
    "upcycle": "tools/upcycle_checkpoint.py",
    "preprocess": "tools/preprocess_data.py",
    "train-tokenizer": "tools/train_tokenizer.py",
    "inspect-data": "tools/inspect_data.py",
    "inspect": "tools/inspect_checkpoint.py",
    "convert": "tools/convert_checkpoint.py",
    "export": "tools/export_hf.py",
    "import": "tools/import_hf.py",
    "evaluate": "tools/evaluate.py",
    "generate": "tools/generate.py",
    "retrieve": "tools/retrieve_unlearning_data.py",
    "count": "tools/count_model.py",
    "plot": "tools/plot_runs.py",
}
"""The files of the repository that run a verb, relative to its root."""


def program_words(verb: str) -> list[str]:
    """Return what follows `python` to run a verb as this process was started."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py" and started.parent.name == PACKAGE:
        return ["-m", PACKAGE, verb]
    for file in FILES.values():
        if started.name == Path(file).name and verb in FILES:
            return [os.path.normpath(started.parent / ("../" * file.count("/")) / FILES[verb])]
    return [sys.argv[0], verb]


def command_words(verb: str) -> list[str]:
    """Return what a user types to run a verb as this process was started."""
    program = program_words(verb)
    return ["python", *program] if len(program) != 2 else [COMMAND, verb]


def command(verb: str) -> str:
    """Return the command that runs a verb, quoted for a shell, such as `nexus grow`."""
    return shlex.join(command_words(verb))


def with_commands(text: str) -> str:
    """Return a text with each `nexus VERB` in it spelt as this process was started."""
    verbs = "|".join(sorted(FILES, key=len, reverse=True))
    return re.sub(rf"\b{COMMAND} ({verbs})\b", lambda found: command(found[1]), text)

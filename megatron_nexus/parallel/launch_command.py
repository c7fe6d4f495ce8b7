"""The command that started this run, for the line that continues it: launcher, its flags, the program.

    deepspeed --num_gpus 4 pretrain_nexus.py      torchrun --nproc-per-node 4 pretrain_nexus.py
    python -m megatron_nexus                      mpirun -n 4 python pretrain_nexus.py

A process knows it from its own command line and those of its ancestors: the outermost that ends with the
program and its flags is what was typed. Where a launcher is not an ancestor, as srun, the line is made up.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_nexus.parallel.launcher_watch import PROGRAMS, ancestors
from megatron_nexus.parallel.world import World

MODULES = ("megatron_nexus", "megatron_nexus.command")
ADDED_BY_LAUNCHERS = ("--local_rank", "--local-rank")


def launch_words(world: World, argv: Sequence[str]) -> list[str]:
    """The words that start the program again on such a world; its flags `argv` follow them."""
    own = typed_words([sys.orig_argv], sys.argv[0], argv) or ["python", sys.argv[0]]
    found = typed_words([sys.orig_argv, *(process.words for process in ancestors())], sys.argv[0], argv)
    program = own if own[0] in PROGRAMS or not _is_python(own[0]) else own[1:]
    match world.launcher:
        case "srun":
            return ["srun", "--kill-on-bad-exit=1", *own]
        case "mpirun" if not _is_launcher(found):
            return ["mpirun", "-n", str(world.size), *own]
        case "torchrun" if not _is_launcher(found):
            return ["torchrun", "--nproc-per-node", str(world.local_size), *program]
        case "deepspeed" if not _is_launcher(found):
            module = program[0] == "-m"
            return [
                "deepspeed",
                *("--num_gpus", str(world.local_size)),
                *(["--module", program[1]] if module else program),
            ]
        case _:
            return found or own


def program_words(argv: Sequence[str]) -> list[str]:
    """What Python runs as this program with the flags `argv`: a script, or `-m` and a module."""
    main = sys.modules["__main__"].__spec__
    return [*(["-m", "megatron_nexus"] if main is not None else [sys.argv[0]]), *argv]


def typed_words(lines: Iterable[Sequence[str]], script: str, argv: Sequence[str]) -> list[str]:
    """What stands before the flags `argv` in the last of the command lines that starts the program with them.

    The interpreter of an installed command is left out, and the folders of commands. Empty where none does.
    """
    flags = _typed(argv)
    found: list[str] = []
    for line in lines:
        words = _typed(line)
        before = words[: len(words) - len(flags)]
        if words[len(before) :] != flags or not before or "deepspeed.launcher.launch" in before:
            continue
        module = before[-1] in MODULES and before[-2:-1] in (["-m"], ["--module"])
        if not module and Path(before[-1]).name != Path(script).name:
            continue
        if _is_python(before[0]) and len(before) > 1:
            before = [word for word in before if word != "-u"]
            if not before[1].startswith("-") and not before[1].endswith(".py"):
                before = before[1:]  # an installed command
        if _is_python(before[0]):
            found = before
        elif Path(before[0]).name in PROGRAMS or len(before) == 1:
            found = [Path(before[0]).name, *before[1:]]
    return found


def _typed(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.split("=")[0] not in ADDED_BY_LAUNCHERS]


def _is_python(word: str) -> bool:
    return Path(word).name.startswith("python")


def _is_launcher(words: Sequence[str]) -> bool:
    return any(Path(word).name in PROGRAMS for word in words[:3])

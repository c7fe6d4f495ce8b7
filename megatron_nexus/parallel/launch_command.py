"""The command that started this run, for the line that continues it: launcher, its flags, the program.

    deepspeed --num_gpus 4 pretrain_nexus.py          nexus launch --num_gpus 4 train
    torchrun --nproc-per-node 4 pretrain_nexus.py     mpirun -n 4 nexus train

A process knows it from its own command line and those of its ancestors: the outermost that ends with the
program and its flags is what was typed. Where a launcher is not an ancestor, as srun, the line is made up.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_nexus.base.invocation import PACKAGE, command_words
from megatron_nexus.parallel.launcher_watch import LAUNCH, PROGRAMS, ancestors, is_nexus_launch
from megatron_nexus.parallel.world import World

VERBS = ("train", "unlearn")
ADDED_BY_LAUNCHERS = ("--local_rank", "--local-rank")


def launch_words(world: World, argv: Sequence[str], verb: str) -> list[str]:
    """Return the words that start a verb again on such a world; its flags `argv` follow them."""
    own = typed_words([sys.orig_argv], sys.argv[0], argv) or command_words(verb)
    found = typed_words([sys.orig_argv, *(process.words for process in ancestors())], sys.argv[0], argv)
    is_launcher = is_nexus_launch(found) or any(Path(word).name in PROGRAMS for word in found[:3])
    script = own[1:] if own[-1].endswith(".py") else ["-m", PACKAGE, verb]
    match world.launcher:
        case "srun":
            return ["srun", "--kill-on-bad-exit=1", *own]
        case "mpirun" if not is_launcher:
            return ["mpirun", "-n", str(world.size), *own]
        case "torchrun" if not is_launcher:
            return ["torchrun", "--nproc-per-node", str(world.local_size), *script]
        case "deepspeed" if not is_launcher:
            devices = ["--num_gpus", str(world.local_size)]
            if own[-1].endswith(".py"):
                return ["deepspeed", *devices, *script]
            return [*command_words(LAUNCH), *devices, verb]
        case _:
            return found or own


def typed_words(lines: Iterable[Sequence[str]], script: str, argv: Sequence[str]) -> list[str]:
    """Return what stands before the flags `argv` in the last command line that starts the program with them.

    The interpreter of an installed command is left out, and the folders of commands. Empty where none does.
    """
    flags = _typed(argv)
    found: list[str] = []
    for line in lines:
        words = _typed(line)
        before = words[: len(words) - len(flags)]
        if words[len(before) :] != flags or not before or "deepspeed.launcher.launch" in before:
            continue
        program = _program(before)
        module = program[-2:] in (["-m", PACKAGE], ["--module", PACKAGE])
        if not module and Path(program[-1]).name != Path(script).name:
            continue
        if _is_python(before[0]) and len(before) > 1:
            before = [word for word in before if word != "-u"]
            if not before[1].startswith("-") and not before[1].endswith(".py"):
                before = before[1:]  # an installed command
        if _is_python(before[0]):
            found = before
        elif Path(before[0]).name in (*PROGRAMS, Path(script).name):
            found = [Path(before[0]).name, *before[1:]]
    return found


def _program(words: Sequence[str]) -> list[str]:
    """Return the words of a command line up to the program, without the verb, or `launch`, after it."""
    if words[-1] not in VERBS or len(words) == 1:
        return list(words)
    return list(words[: words.index(LAUNCH)] if is_nexus_launch(words) else words[:-1])


def _typed(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.split("=")[0] not in ADDED_BY_LAUNCHERS]


def _is_python(word: str) -> bool:
    return Path(word).name.startswith("python")

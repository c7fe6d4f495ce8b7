"""The command `nexus`: a table of verbs, each of them a module that is imported when it is called.

    nexus train --tp 2 --pp 2               python -m megatron_nexus train --tp 2 --pp 2

Files such as `pretrain_nexus.py` call `main` with the verb that they stand for.
"""

import difflib
import importlib
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from megatron_nexus import __version__
from megatron_nexus.base.invocation import COMMAND
from megatron_nexus.base.linux import require_linux
from megatron_nexus.errors import EXIT_CODE_USER_ERROR, ConfigError


@dataclass(frozen=True)
class Verb:
    """A verb of the command: the module of `megatron_nexus.cli` that runs it, and what it does."""

    module: str
    summary: str


GROUPS: dict[str, dict[str, Verb]] = {
    "Train": {
        "train": Verb("train", "pretrain a model; resume a run, or grow its model while loading"),
        "unlearn": Verb("unlearn", "train a model to forget some answers and to retain others"),
        "launch": Verb(
            "launch", "start `train` or `unlearn` on many devices or nodes with DeepSpeed's runner"
        ),
        "presets": Verb("presets", "list the named models with their true sizes"),
        "count": Verb("count", "parameters, FLOPs and bytes per rank of a model"),
        "compare": Verb("compare", "name the first tensor in which two runs or topologies differ"),
        "plot": Verb("plot", "draw the losses of several runs in one picture"),
        "report": Verb("report", "write an HTML page of runs and growths: curves, metrics, lineage"),
        "analyze": Verb("analyze", "measure how a growth's new weights part from the older ones"),
        "advise": Verb("advise", "say whether to grow a run now, later or never, and what that saves"),
    },
    "Data": {
        "train-tokenizer": Verb("train_tokenizer", "train a lossless SentencePiece tokenizer on text files"),
        "preprocess": Verb("preprocess", "tokenize text files into a .bin/.idx corpus"),
        "inspect-data": Verb("inspect_data", "show and check a tokenized corpus"),
    },
    "Checkpoints": {
        "inspect": Verb("inspect_checkpoint", "show what a checkpoint holds, and check its bytes"),
        "grow": Verb("grow", "enlarge a trained model with its optimizer state, or reshard it"),
        "upcycle": Verb("upcycle", "add Nexus-Ranks or higher-order attention to a trained model"),
        "convert": Verb("convert", "write one plain safetensors file, or DeepSpeed's universal checkpoint"),
        "export": Verb("export_hf", "write a folder that Hugging Face's transformers loads"),
        "import": Verb("import_hf", "read a Hugging Face folder or a .gguf file as a checkpoint"),
    },
    "Evaluation": {
        "evaluate": Verb("evaluate", "score a model on tasks and held-out texts"),
        "generate": Verb("generate", "continue a text"),
        "retrieve": Verb("retrieve", "choose what an unlearning run forgets and retains, by gradients"),
    },
    "Shell": {
        "completion": Verb("completion", "print a script that completes verbs and flags by TAB"),
    },
}
VERBS = {name: verb for group in GROUPS.values() for name, verb in group.items()}


def main(verb: str | None = None) -> NoReturn:
    """Run `verb`, or the one that the command line names first, and end the process."""
    try:
        require_linux()
    except ConfigError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(EXIT_CODE_USER_ERROR)
    argv = sys.argv[1:]
    if verb is None:
        verb, argv = _split(argv)
    # Until the verb itself listens, Ctrl-C ends the process at once: there is nothing to save.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    run: Callable[[list[str]], None] = importlib.import_module(f"megatron_nexus.cli.{VERBS[verb].module}").run
    if verb in ("train", "unlearn", "retrieve"):
        run(argv)  # ends the process, after handling signals and errors of its own
    from megatron_nexus.cli.runner import run_tool

    signal.signal(signal.SIGINT, interrupt)
    run_tool(lambda: run(argv))


def overview() -> str:
    """Return the help of the command: its verbs by group, a line each."""
    lines = [
        f"usage: {COMMAND} VERB [flags]",
        "",
        "Pretrain a Nexusformer on a cluster, grow it when it has run out of capacity, and go on training.",
    ]
    for group, verbs in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:16} {verb.summary}" for name, verb in verbs.items())]
    return "\n".join([*lines, "", f"`{COMMAND} VERB --help` lists the flags of a verb.", ""])


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """Return the verb of a command line and what is left of it; end the process where there is none."""
    at = 0
    while argv[at:] and argv[at].startswith(("--local_rank", "--local-rank")):
        at += 1  # DeepSpeed's and torch's launchers put it first
    word = argv[at] if argv[at:] else "--help"
    if word in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        sys.exit(0)
    if word == "--version":
        sys.stdout.write(f"megatron_nexus {__version__}\n")
        sys.exit(0)
    if word in VERBS:
        return word, argv[:at] + argv[at + 1 :]
    if word.startswith("-"):
        remedy = f"a verb comes first, such as {COMMAND} train {word}"
    else:
        near = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.4)
        meant = f"did you mean {COMMAND} {near[0]}? " if near else ""
        remedy = f"{meant}{COMMAND} --help lists all verbs"
    sys.stderr.write(f"ConfigError: {ConfigError(f'{word!r} is not a verb: {remedy}')}\n")
    sys.exit(2)

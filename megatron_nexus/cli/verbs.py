"""The verbs of the command `nexus`, by group."""

from dataclasses import dataclass

from megatron_nexus.base.invocation import COMMAND


@dataclass(frozen=True)
class Verb:
    """A verb of the command: the module of `megatron_nexus.cli` that runs it, and what it does."""

    module: str
    summary: str


GROUPS: dict[str, dict[str, Verb]] = {
    "Train": {
        "train": Verb("train", "pretrain a model; resume a run, or grow its model while loading"),
        "unlearn": Verb("train", "train a model to forget some answers and to retain others"),
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

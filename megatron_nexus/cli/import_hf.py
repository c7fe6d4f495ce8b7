"""The verb `import`: read a model of others as a checkpoint to train, grow and evaluate.

    nexus import --input Qwen3-0.6B --save runs/qwen3        a folder of Hugging Face's
    nexus import --input smollm2.gguf --save runs/smollm2    a file of llama.cpp's

Weights are streamed into pieces with zero moments; the tokenizer goes along.
"""

import dataclasses
import os
import re
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.cli.arguments import folder_on_disk
from megatron_nexus.cli.next_command import log_next_command, train_command
from megatron_nexus.config.command_line import build
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import DataError
from megatron_nexus.interchange.hf_config import context_length, model_of, ties_head
from megatron_nexus.interchange.output_dir import check_is_new
from megatron_nexus.interchange.safetensors_folder import open_folder
from megatron_nexus.interchange.source_model import SourceModel

AFFORDABLE_TOKENS = 512
"""Largest --seq-length to begin with: a large model's context may be more than this machine can train on."""


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "import",
        "--input PATH --save FOLDER [flags]",
        description=(
            "Make a checkpoint of a Llama, Mistral, Qwen2, Qwen3, OLMo 2 or SmolLM3, to be trained on, grown "
            "and evaluated here. The source is never touched."
        ),
    )
    flag = parser.add_flag
    text = "a folder with config.json and safetensors, or a .gguf file, which is dequantised"
    flag("--input", text, required=True, type=Path, metavar="PATH")
    flag("--save", "of the new run; must not exist yet", required=True, metavar="FOLDER")
    flag("--no-tokenizer", "leave the tokenizer of the source out", action="store_true")
    flag("--allow-nonfinite", "import weights that are NaN or infinite, too", action="store_true")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus import` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    origin: Path = given.input
    root = folder_on_disk("--save", given.save, origin)
    check_is_new(root)
    source = open_source(origin)
    if given.no_tokenizer:
        source = dataclasses.replace(source, write_tokenizer=None)
    config = configuration(source)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with log.importing("torch"):
        from megatron_nexus.interchange.import_checkpoint import import_checkpoint
        from megatron_nexus.models.decoder import decoder_specs
        from megatron_nexus.spec.cost import parameter_count

    specs = decoder_specs(config.model)
    log.logger.info(
        "importing %s: %s, %s parameters",
        origin,
        source.config["model_type"],
        f"{parameter_count(specs.values()):,}",
    )
    if ties_head(source.config):
        log.logger.info(
            "the source ties the LM head to the embedding; it is untied here (a copy, %s parameters more)",
            f"{specs['head.weight'].numel:,}",
        )
    made = import_checkpoint(source, origin, root, config, given.allow_nonfinite)
    log.logger.info("wrote %s", made)
    has_tokenizer = source.write_tokenizer is not None
    why = "left out, as --no-tokenizer says" if given.no_tokenizer else "the source has no tokenizer.json"
    log.logger.info("tokenizer: %s", root / "tokenizer" if has_tokenizer else why)
    tokens = min(config.training.seq_length, AFFORDABLE_TOKENS)
    command = train_command("--load", str(root), "--seq-length", str(tokens))
    log_next_command(command, config, has_tokenizer)


def open_source(path: Path) -> SourceModel:
    """Open the model at a path: a .gguf file, or a folder with config.json and safetensors.

    Raises CheckpointError, DataError: there is none, or a package is missing.
    """
    if path.suffix != ".gguf":
        return open_folder(path)
    try:
        from megatron_nexus.interchange.gguf_file import open_gguf
    except ImportError:
        raise DataError(f"{path} needs the package gguf, which is not installed: pip install gguf") from None
    with log.Progress(f"reading {path}"):
        return open_gguf(path)


def configuration(source: SourceModel) -> RunConfig:
    """Return the configuration of a run that begins with a model: its sizes, and its context length.

    Raises ConfigError where this decoder does not compute it.
    """
    model = model_of(source.config)
    name = re.sub(r"[^\w.+-]+", "-", source.name).strip("-") or "imported"
    sizes = {"seq_length": context_length(source.config), "micro_batch_size": 1}
    config = build({"preset": name, **vars(model), **sizes})
    check(config, 1)
    return config

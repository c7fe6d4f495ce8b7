"""The verb `export`: write a checkpoint as a folder that Hugging Face's transformers loads.

    nexus export --load runs/240m --output hf/240m

Weights are streamed piece by piece; the tokenizer goes along where it is known.
"""

import os
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.cli.arguments import folder_on_disk, positive
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.interchange.output_dir import check_is_new

NO_TOKENIZER = "none"


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "export",
        "--load RUN --output FOLDER [flags]",
        description=(
            "Write a checkpoint as a folder that transformers loads: configuration, safetensors, tokenizer, "
            "and the model's code where transformers has none. The source is never touched."
        ),
    )
    flag = parser.add_flag
    flag("--load", "a run's folder, or one checkpoint in it", required=True)
    flag("--output", "must not exist yet", required=True, metavar="FOLDER")
    flag("--dtype", "of the weights (default: fp32)", choices=("fp32", "bf16"), default="fp32")
    text = f"where to find the run's tokenizer if it has moved; {NO_TOKENIZER}: export none"
    flag("--tokenizer-model", text, default="", metavar="PATH")
    flag("--shard-gb", "largest weight file (default: 5)", type=positive(float), default=5.0, metavar="GB")
    flag("--allow-nonfinite", "export weights that are NaN or infinite, too", action="store_true")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus export` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    saved = open_saved_run(location(given.load))
    target = folder_on_disk("--output", given.output, saved.checkpoint)
    check_is_new(target)
    path = Path(given.tokenizer_model) if given.tokenizer_model else None
    tokenizer = None
    if given.tokenizer_model != NO_TOKENIZER:
        tokenizer = find_tokenizer(saved.config, tokenizer_record(saved.manifest), path)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with log.importing("torch"):
        from megatron_nexus.interchange.export import export_checkpoint
        from megatron_nexus.interchange.model_card import loading_code
        from megatron_nexus.interchange.tokenizer_files import require_convertible

    require_convertible(tokenizer)
    shard_bytes = int(given.shard_gb * 1e9)
    made = export_checkpoint(
        saved.checkpoint, target, saved.config, tokenizer, given.dtype, shard_bytes, given.allow_nonfinite
    )
    count = len(made.files)
    files = f"{count} file{'s' if count > 1 else ''} of weights"
    log.logger.info("wrote %s: %s in %s, %s", target, saved.config.preset, given.dtype, files)
    if made.tied:
        log.logger.info("the LM head is tied to the embedding, as in the imported model")
    if tokenizer is not None:
        log.logger.info("tokenizer: %s", made.tokenizer)
    elif given.tokenizer_model == NO_TOKENIZER:
        log.logger.info("tokenizer: none, as --tokenizer-model none says")
    else:
        log.logger.info(
            "tokenizer: none is known: the run read token files without one; give it with "
            "--tokenizer-model to export it too"
        )
    log.logger.info("load with")
    for line in loading_code(made.architecture, str(target), tokenizer is not None):
        log.logger.info("  %s", line)

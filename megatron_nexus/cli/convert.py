"""The verb `convert`: a checkpoint in the formats of others.

    nexus convert --load runs/240m --save out --dtype bf16          out/model.safetensors
    nexus convert --load runs/240m --save out --format universal    DeepSpeed's layout

One process, no accelerator, no model: tensors are read box by box from whatever topology wrote them.
"""

import json
from collections import Counter
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.base.json_text import read_object
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.checkpoint.non_finite import NonFiniteValues
from megatron_nexus.checkpoint.run_dir import find_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.cli.arguments import folder_on_disk
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.errors import ConfigError, raise_problems

MODEL_FILE = "model.safetensors"


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "convert",
        "--load RUN --save FOLDER [flags]",
        description="Write a checkpoint in the format of others. The source is never touched.",
    )
    flag = parser.add_flag
    flag("--load", "a run's folder, or one checkpoint in it", required=True)
    flag("--save", "folder that is made for the result", required=True)
    flag(
        "--format",
        f"safetensors: one plain {MODEL_FILE}; universal: DeepSpeed's universal checkpoint "
        "(default: safetensors)",
        choices=("safetensors", "universal"),
        default="safetensors",
    )
    flag("--dtype", f"of {MODEL_FILE} (default: fp32)", choices=("fp32", "bf16"), default="fp32")
    text = "Adam's moments too, in exp_avg.safetensors and exp_avg_sq.safetensors, fp32"
    flag("--moments", text, action="store_true")
    flag("--allow-nonfinite", "convert values that are NaN or infinite, too", action="store_true")
    text = "JSON object with the names that another program has for parameters, by their names here"
    flag("--names", text, default="", metavar="FILE")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus convert` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    is_universal = given.format == "universal"
    if is_universal and (given.moments or given.dtype != "fp32"):
        raise ConfigError(
            "--format universal holds fp32 weights and both moments, always: drop --dtype and --moments"
        )
    source = find_checkpoint(location(given.load))
    reader = CheckpointReader(source)
    manifest = reader.manifest
    names = read_names(given.names, manifest)
    save = folder_on_disk("--save", given.save, source)
    # torch is imported only now: wrong flags are answered at once.
    with log.importing("torch"):
        from megatron_nexus.interchange.output_dir import output_dir
        from megatron_nexus.interchange.safetensors_writer import (
            Precision,
            plain_bytes,
            write_safetensors,
        )
        from megatron_nexus.interchange.universal_checkpoint import universal_bytes, write_universal

    files: dict[str, Precision] = {"fp32": given.dtype}
    if given.moments:
        files |= dict.fromkeys(STATES[1:], "fp32")
    if is_universal:
        total = universal_bytes(manifest.specs)
    else:
        total = sum(plain_bytes(manifest.specs, precision) for precision in files.values())
    non_finite = NonFiniteValues()
    with (
        output_dir(save, total) as folder,
        log.Progress(f"converting {source}", total, "MB") as progress,
    ):
        if is_universal:
            write_universal(folder, reader, names, progress.advance, non_finite)
        else:
            metadata = {
                "producer": "megatron_nexus",
                "step": str(manifest.progress.step),
                "tokens": str(manifest.progress.tokens),
                "tokenizer": manifest.tokenizer_fingerprint,
                "model": json.dumps(manifest.config["model"]),
            }
            for state, precision in files.items():
                path = folder / (MODEL_FILE if state == "fp32" else f"{state}.safetensors")
                write_safetensors(
                    path, reader, state, precision, names, metadata, progress.advance, non_finite
                )
        non_finite.refuse(source, given.allow_nonfinite)
    log.logger.info("wrote %s: %s bytes of tensors", save, f"{total:,}")
    if is_universal:
        _log_how_to_load(save, manifest)


def read_names(file: str, manifest: Manifest) -> dict[str, str]:
    """Return the name that each parameter is written under, by its logical name.

    Raises ConfigError: the file is not such an object, or two parameters get one name.
    """
    names = {name: name for name in manifest.specs}
    if not file:
        return names
    given = read_object("--names", Path(file))
    problems = [
        f"--names {file} has {name!r}, which is not a parameter of the checkpoint: "
        "inspect_checkpoint.py --tensors lists them"
        for name in given
        if name not in names
    ]
    problems += [
        f"--names {file} calls {name} {theirs!r}: give a name without slashes"
        for name, theirs in given.items()
        if not isinstance(theirs, str) or theirs in ("", ".", "..") or "/" in theirs or "\0" in theirs
    ]
    raise_problems(problems)
    names |= given
    for theirs, times in Counter(names.values()).items():
        if times > 1:
            same = " and ".join(name for name in names if names[name] == theirs)
            problems.append(f"--names {file} calls {same} {theirs!r}: give each a name of its own")
    raise_problems(problems)
    return names


def _log_how_to_load(save: Path, manifest: Manifest) -> None:
    log.logger.info('  DeepSpeed loads it with "checkpoint": {"load_universal": true} and')
    log.logger.info("  engine.load_checkpoint(%r, load_lr_scheduler_states=False)", str(save))
    groups = ", ".join(manifest.optimizer.groups)
    log.logger.info("  its optimizer must have the groups %s, in this order", groups)
    if manifest.optimizer.grown_regions:
        log.logger.warning(
            "note: %d parts of tensors that growth added count their own steps of Adam; DeepSpeed has one "
            "count for all, under which their first updates are biased",
            len(manifest.optimizer.grown_regions),
        )

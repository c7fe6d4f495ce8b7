"""The verb `preprocess`: text files to a tokenized corpus."""

import argparse
import os
import sys
import traceback
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.base.communicator import get_communicator
from megatron_nexus.base.workers import start_server
from megatron_nexus.cli.arguments import add_reading_arguments, positive, prefix, record_format
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.megatron_flags import instead_of_preprocessing
from megatron_nexus.errors import NexusError

EPILOG = """\
Finished shards are kept in PREFIX.shards until the corpus is complete: after a kill run the same command
again.
On several machines: mpirun -n MACHINES (or one process a core) python tools/preprocess_data.py ...; all need
the inputs, the tokenizer and the output folder under the same paths.
"""


def run(argv: list[str]) -> None:
    """Run `nexus preprocess` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    reading = record_format(given)
    start_server("megatron_nexus.data.shards")
    # Takes as long as the server needs to start: both at once.
    from megatron_nexus.data.preprocess import PreprocessConfig, preprocess, work_folder
    from megatron_nexus.data.shards import TokenizeConfig

    job = PreprocessConfig(
        inputs=given.input,
        output_prefix=given.output_prefix,
        tokenizing=TokenizeConfig(
            work_folder(given.output_prefix),
            given.tokenizer_model,
            reading,
            given.append_eod,
            given.strict,
            given.prepend_bos,
        ),
        overwrite=given.overwrite,
        workers=given.workers,
        log_interval_s=given.log_interval,
    )
    comm = get_communicator(os.environ)
    log.configure(is_main_rank=comm.rank == 0)
    try:
        preprocess(job, comm)
    except NexusError:
        raise
    except BaseException as error:
        if comm.size > 1:
            # Other ranks wait for messages of this one.
            sys.stderr.write("".join(traceback.format_exception(error)))
            comm.abort()
        shards = job.tokenizing.folder
        if isinstance(error, KeyboardInterrupt) and shards.exists():
            kept = f"finished shards are kept in {shards}: the same command continues from there"
            raise KeyboardInterrupt(kept) from None
        raise


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "preprocess",
        "--input PATH... --output-prefix PREFIX --tokenizer-model PATH [flags]",
        description="Text files to a corpus: PREFIX.bin, PREFIX.idx (Megatron-LM's format), PREFIX.json.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.replacement_hint = instead_of_preprocessing
    add_reading_arguments(parser)
    flag = parser.add_flag
    flag("--output-prefix", "without ending", required=True, type=prefix, metavar="PREFIX")
    text = "SentencePiece .model, tokenizer.json or a folder with one"
    flag("--tokenizer-model", text, required=True, type=Path, metavar="PATH")
    text = "end every document with the tokenizer's end token, as the built-in corpus does (default: yes)"
    flag("--append-eod", text, action=argparse.BooleanOptionalAction, default=True)
    text = "begin every document with the tokenizer's BOS token (default: as the tokenizer itself does)"
    flag("--prepend-bos", text, action=argparse.BooleanOptionalAction, default=None)
    flag("--workers", "processes a rank (default: one a core)", type=positive(int), default=0)
    flag("--strict", "the first malformed record is an error", action="store_true")
    flag("--overwrite", "replace an existing corpus", action="store_true")
    flag("--log-interval", "seconds between progress lines", type=positive(float), default=5.0, metavar="S")
    return parser

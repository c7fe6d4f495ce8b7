"""The verb `preprocess`: text files to a tokenized corpus."""

import argparse
import os
import sys
import traceback
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.base.communicator import get_communicator
from megatron_nexus.base.workers import start_server
from megatron_nexus.cli.arguments import add_reading_arguments, positive, prefix
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.megatron_flags import instead_of_preprocessing
from megatron_nexus.data.documents import RecordFormat
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
            RecordFormat(given.json_keys, given.txt_documents),
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
    parser.add_argument(
        "--output-prefix", required=True, type=prefix, metavar="PREFIX", help="without ending"
    )
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        type=Path,
        metavar="PATH",
        help="SentencePiece .model, tokenizer.json or a folder with one",
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's end token, as the built-in corpus does (default: yes)",
    )
    parser.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin every document with the tokenizer's BOS token (default: as the tokenizer itself does)",
    )
    parser.add_argument(
        "--workers", type=positive(int), default=0, help="processes a rank (default: one a core)"
    )
    parser.add_argument("--strict", action="store_true", help="the first malformed record is an error")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    parser.add_argument(
        "--log-interval",
        type=positive(float),
        default=5.0,
        metavar="S",
        help="seconds between progress lines",
    )
    return parser

"""The verb `train-tokenizer`: a lossless SentencePiece tokenizer for a corpus of text."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_nexus import log
from megatron_nexus.cli.arguments import add_reading_arguments, positive, record_format
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.data.documents import (
    REPORTED,
    Document,
    bad_record_lines,
    no_document,
    read_slice,
    split_into_slices,
)
from megatron_nexus.data.input_files import empty_file_lines, find_input_files
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.errors import ConfigError, DataError


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "train-tokenizer",
        "--input PATH... --output FILE [flags]",
        description="Train a byte-fallback BPE that gives every text back exactly, on a sample of the input.",
    )
    add_reading_arguments(parser)
    flag = parser.add_flag
    flag("--output", "such as spm.model", required=True, type=Path, metavar="FILE")
    flag("--vocab-size", "pieces (default: 32000)", type=positive(int), default=32_000)
    text = "text to train on, chosen by the documents' hashes (default: 64)"
    flag("--sample-mb", text, type=positive(int), default=64, metavar="MB")
    flag("--strict", "the first malformed record is an error", action="store_true")
    flag("--overwrite", "replace an existing file", action="store_true")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus train-tokenizer` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    output: Path = given.output
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder: add a name, such as {output / 'spm.model'}")
    if output.suffix == ".json":
        # Which would be read as a tokenizer.json wherever it is given.
        wanted = output.with_suffix(".model")
        raise ConfigError(
            f"--output {output} has the ending of another kind of tokenizer: name it such as {wanted}"
        )
    if output.exists() and not given.overwrite:
        raise ConfigError(f"--output {output} exists: add --overwrite or choose another name")
    reading = record_format(given)
    files = find_input_files(given.input, given.strict)
    slices = split_into_slices(files, reading, sys.maxsize)
    left_out: Counter[str] = Counter()
    samples: list[str] = []

    def documents() -> Iterator[str]:
        texts = empty = 0
        for file_slice in slices:
            for record in read_slice(file_slice, reading):
                if isinstance(record, Document):
                    if record.text.strip("\n"):
                        texts += 1
                        yield record.text
                    else:
                        empty += 1
                elif given.strict:
                    raise DataError(f"{record.describe()}: fix it, or run without --strict to leave it out")
                else:
                    left_out[record.reason] += 1
                    if len(samples) < REPORTED:
                        samples.append(record.describe())
            progress.advance(file_slice.size)
        if not texts:
            raise no_document(empty, left_out, samples, empty_file_lines(files))

    total = sum(file_slice.size for file_slice in slices)
    with _writable(output), log.Progress("Reading and training", total, "MB") as progress:
        train_sentencepiece_bpe(documents(), output, given.vocab_size, given.sample_mb * 1_000_000)
    for line in (*empty_file_lines(files), *bad_record_lines(left_out, samples)):
        log.logger.warning("%s", line)
    tokenizer = SentencePieceTokenizer(output)
    log.logger.info("%s: %s pieces, sha256 %s", output, f"{tokenizer.vocab_size:,}", tokenizer.fingerprint)


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    """Check that a file can be written before the work; leave nothing if that fails. Raises ConfigError."""
    made = [place for place in (output.parent, *output.parent.parents) if not place.exists()]
    draft = output.with_name(f"{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        yield
    except OSError as error:
        raise ConfigError(
            f"--output {output} cannot be written ({error.strerror}): choose a name in another folder"
        ) from None
    finally:
        with suppress(OSError):  # a folder that holds the file stays
            draft.unlink(missing_ok=True)
            for place in made:
                place.rmdir()

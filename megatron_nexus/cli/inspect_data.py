"""The verb `inspect-data`: show what a tokenized corpus holds, and check it."""

from pathlib import Path

import numpy as np

from megatron_nexus import log
from megatron_nexus.cli.arguments import count, prefix
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.data.corpus_description import CorpusDescription, changed_text, read_description
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.data.inspection import (
    count_token,
    find_problems,
    length_histogram,
    sample_documents,
    sample_text,
)
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.errors import DataError

BAR_WIDTH = 50


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser("inspect-data", "PREFIX [flags]", description="Show and check a tokenized corpus.")
    flag = parser.add_flag
    flag("prefix", "of its .bin and .idx files", type=prefix)
    text = "to decode samples and to check that it is the right one"
    flag("--tokenizer-model", text, type=Path, metavar="PATH")
    flag("--samples", "documents to decode (default: 3)", type=count, default=3)
    flag("--skip-checks", "do not read all tokens", action="store_true")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus inspect-data` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    dataset = IndexedDataset(given.prefix)
    description = read_description(given.prefix)
    tokenizer = open_tokenizer(given.tokenizer_model) if given.tokenizer_model else None
    _show(dataset, description)
    _show_loss(dataset, description, None if given.skip_checks else tokenizer)
    if tokenizer is not None:
        for document in sample_documents(dataset, given.samples):
            text = sample_text(dataset, document, tokenizer)
            begins = f"begins {text!r}" if text is not None else "has ids that the tokenizer does not have"
            log.logger.info("document %s %s", f"{document:,}", begins)
    if given.skip_checks:
        return
    with log.Progress("Reading all tokens"):
        problems = find_problems(dataset, description, tokenizer)
    if problems:
        raise DataError("\n  ".join([f"{given.prefix} is not sound", *problems]))
    log.logger.info("No problem found")


def _show(dataset: IndexedDataset, description: CorpusDescription | None) -> None:
    info = log.logger.info
    lengths = dataset.document_lengths
    info("documents        %s", f"{dataset.document_count:,}")
    info("tokens           %s, stored as %s", f"{dataset.token_count:,}", dataset.dtype.name)
    if description is None:
        info("description      none: not written by this project's preprocessing")
    else:
        info("tokenizer        %s, %s ids", description.tokenizer, f"{description.vocab_size:,}")
        begin = f"begin with BOS, token {description.bos_id}" if description.prepend_bos else "have no BOS"
        info("documents        %s", begin)
        info("bytes per token  %.2f", description.text_bytes / max(1, description.tokens))
        info(
            "left out         %s empty, %s malformed records; %s empty files",
            f"{description.empty_documents:,}",
            f"{sum(description.malformed.values()):,}",
            f"{description.empty_files:,}",
        )
        for sample in description.malformed_samples:
            info("                 %s", sample)
    info(
        "document length  mean %s, median %s, 99 %% below %s, longest %s tokens",
        f"{lengths.mean():,.0f}",
        f"{np.median(lengths):,.0f}",
        f"{np.percentile(lengths, 99):,.0f}",
        f"{lengths.max():,}",
    )
    bins = length_histogram(lengths)
    most = max(entry.documents for entry in bins)
    for entry in bins:
        bar = "#" * round(BAR_WIDTH * entry.documents / most)
        info("%12s ... %12s  %s %s", f"{entry.smallest:,}", f"{entry.largest:,}", bar, f"{entry.documents:,}")


def _show_loss(
    dataset: IndexedDataset, description: CorpusDescription | None, tokenizer: Tokenizer | None
) -> None:
    """Log what the tokens lose of the text, as the description says, or else the tokenizer."""
    unknown = description.unknown_share if description else None
    if unknown is None and tokenizer is not None:
        unknown = 0.0 if tokenizer.unk_id is None else count_token(dataset, tokenizer.unk_id)
        unknown /= max(1, dataset.token_count)
    share = "not known" if unknown is None else f"{100 * unknown:.3g} % of the tokens"
    log.logger.info("unknown ids      %s", share)
    if description is not None and description.lossless is not None:
        lossless = (
            "yes"
            if description.lossless
            else (
                f"no: {description.changed_documents:,} documents come back changed, such as "
                f"{changed_text(description.changed_example)}"
            )
        )
    elif tokenizer is not None:
        lossless = "yes" if tokenizer.lossless else "not known: the tokenizer does not keep every text"
    else:
        lossless = "not known"
    log.logger.info("lossless         %s", lossless)

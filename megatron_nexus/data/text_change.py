"""What a tokenizer does not keep: a text compared with what its tokens decode to."""

from collections.abc import Sequence

from megatron_nexus.data.corpus_description import CorpusDescription

BEFORE_CHARACTERS, AFTER_CHARACTERS = 20, 40
"""Around the first character that differs."""


def first_change(text: str, decoded: str) -> list[str]:
    """Return where two texts begin to differ: a piece of each, of the same place."""
    shorter = min(len(text), len(decoded))
    differs = next((i for i in range(shorter) if text[i] != decoded[i]), shorter)
    piece = slice(max(0, differs - BEFORE_CHARACTERS), differs + AFTER_CHARACTERS)
    return [text[piece], decoded[piece]]


def loss_lines(description: CorpusDescription) -> list[str]:
    """Return what is lost in a corpus: lines to warn with, none where nothing is."""
    lines = []
    if description.changed_documents:
        lines.append(
            f"the tokenizer {description.tokenizer} loses text: {description.changed_documents:,} of "
            f"{description.documents + description.empty_documents:,} documents come back changed from their "
            f"tokens, such as {changed_text(description.changed_example)}"
        )
    if description.unknown_share:
        lines.append(
            f"{100 * description.unknown_share:.2g} % of the tokens are unknown ids, which the tokenizer "
            f"{description.tokenizer} gives to what its vocabulary lacks"
        )
    if lines:
        lines.append(
            "a model trained on this corpus never sees what is lost: use a tokenizer that keeps it, as those "
            "of train_tokenizer.py do, unless it is meant"
        )
    return lines


def changed_text(example: Sequence[str]) -> str:
    """Return an example in words: before and after."""
    before, after = example
    return f"{before!r} -> {after!r}"

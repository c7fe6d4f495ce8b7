"""What a checkpoint keeps of the tokenizer that it was trained with."""

from collections.abc import Mapping, Sequence

from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.data.tokenizer_record import TokenizerRecord


def tokenizer_record(manifest: Manifest) -> TokenizerRecord:
    """Return what a checkpoint keeps of its tokenizer."""
    grown = (entry["axes"] for entry in manifest.lineage if "axes" in entry)
    sizes = [axes["vocab_size"] for axes in grown if isinstance(axes, Mapping) and "vocab_size" in axes]
    model = manifest.config["model"]
    assert isinstance(model, Mapping), "a section"
    # The tokenizer of the built-in corpus has as many pieces as the vocabulary had before it first grew.
    first = sizes[0][0] if sizes and isinstance(sizes[0], Sequence) else model["vocab_size"]
    assert isinstance(first, int), "a number of tokens"
    return TokenizerRecord(manifest.tokenizer_fingerprint, manifest.prepend_bos, first)

"""The tokenizer of a checkpoint: the one that its run's settings name, or that of the built-in corpus.

A checkpoint keeps a record of its tokenizer, not the tokenizer.
"""

import hashlib
from pathlib import Path

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.default_corpus import NAME, TOKENIZER_FILE, cache_folder, prepare_default_corpus
from megatron_nexus.data.run_data import tokenizer_path, training_sources
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.data.tokenizer_record import TokenizerRecord
from megatron_nexus.errors import DataError


def find_tokenizer(config: RunConfig, record: TokenizerRecord, given: Path | None = None) -> Tokenizer | None:
    """Return the tokenizer that a checkpoint's tokens mean something in; None where its run knew none.

    It begins documents as `record` says. `given` is where the user says it lies, not the run's settings.

    Raises DataError: the one found is another, cannot be read, or has more tokens than the model.
    """
    data, vocab_size, fingerprint = config.data, config.model.vocab_size, record.fingerprint
    path = given or tokenizer_path(data)
    if path is None and (training_sources(data) or not fingerprint):
        return None
    if path is None:
        pieces = record.built_in_pieces or vocab_size
        path = _built_in(cache_folder(data.data_cache_path), pieces, fingerprint)
    try:
        tokenizer = open_tokenizer(path)
    except DataError as error:
        if given:
            raise
        trained_with = (
            f" that the checkpoint was trained with (sha256 {fingerprint[:12]})" if fingerprint else ""
        )
        raise DataError(f"{error}; give the one{trained_with} as --tokenizer-model") from error
    if fingerprint and tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"the tokenizer {path} (sha256 {tokenizer.fingerprint[:12]}) is not the one that the checkpoint "
            f"was trained with ({fingerprint[:12]}): name that with --tokenizer-model; the built-in corpus "
            "keeps its own, tokenizer.model, in the cache of the machine that trained"
        )
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, the model {vocab_size}: name the "
            "model's own with --tokenizer-model"
        )
    return tokenizer if record.prepend_bos is None else tokenizer.with_bos(record.prepend_bos)


def _built_in(cache: Path, pieces: int, fingerprint: str) -> Path:
    """Return the tokenizer of the built-in corpus: the checkpoint's, of any Python, or that of this one."""
    for path in sorted(cache.glob(f"{NAME}-*/{TOKENIZER_FILE}")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == fingerprint:
            return path
    return prepare_default_corpus(cache, pieces).tokenizer_path

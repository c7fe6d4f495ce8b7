"""The tokenizer that a checkpoint was trained with, found again from what the checkpoint says of it."""

import hashlib
from pathlib import Path

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.default_corpus import NAME, TOKENIZER_FILE, cache_folder
from megatron_nexus.data.library import tokenizer_path, training_sources
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.errors import DataError


def open_trained_tokenizer(config: RunConfig, fingerprint: str, given: str = "") -> Tokenizer:
    """The tokenizer of a checkpoint of this configuration: the file `given`, or the one it was trained with.

    `fingerprint` is the checkpoint's; "" where it was trained on tokens of an unknown tokenizer.

    Raises:
        DataError: the file is not there, is another tokenizer, or has more tokens than the model.
    """
    tokenizer = open_tokenizer(Path(given) if given else _recorded(config, fingerprint))
    if fingerprint not in ("", tokenizer.fingerprint):
        raise DataError(
            f"{tokenizer.model_path} (sha256 {tokenizer.fingerprint[:12]}) is not the tokenizer of the "
            f"checkpoint (sha256 {fingerprint[:12]}): token ids would change their meaning; give the file "
            "that it was trained with as --tokenizer-model"
        )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{tokenizer.model_path} has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}: "
            "give the tokenizer that it was trained with as --tokenizer-model"
        )
    return tokenizer


def _recorded(config: RunConfig, fingerprint: str) -> Path:
    """Where the training run had its tokenizer. Raises DataError where it is not there now."""
    if training_sources(config.data):
        path = tokenizer_path(config.data)
        if path is None:
            raise DataError(
                "the checkpoint was trained on token files without a tokenizer: give --tokenizer-model"
            )
        if not path.exists():
            raise DataError(
                f"the checkpoint was trained with the tokenizer {path}, which is not here: give the same "
                "file as --tokenizer-model"
            )
        return path
    cache = cache_folder(config.data.data_cache_path)
    for path in sorted(cache.glob(f"{NAME}-*/{TOKENIZER_FILE}")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == fingerprint:
            return path
    raise DataError(
        f"the checkpoint was trained with the built-in corpus, and {cache} holds no tokenizer of its kind "
        f"(sha256 {fingerprint[:12]}): copy {NAME}-*/{TOKENIZER_FILE} from the machine that trained, and "
        "give it as --tokenizer-model"
    )

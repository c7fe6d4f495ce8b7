"""Corpus: the token windows of a run, what their tokens mean, and how hard they are without a model."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_nexus.checkpoint.agreement import exchange
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.default_corpus import DefaultCorpus, prepare_default_corpus
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.data.samples import TokenWindows, split_documents
from megatron_nexus.data.statistics import unigram_entropy
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.errors import ConfigError, DataError
from megatron_nexus.log import logger
from megatron_nexus.parallel.mesh import Mesh


@dataclass(frozen=True)
class Corpus:
    """What a run reads. `tokenizer` is None where a token file came without one."""

    training: TokenWindows
    validation: TokenWindows
    tokenizer: Tokenizer | None
    entropy: float

    def validation_batches(self, config: RunConfig) -> int:
        """Global batches per validation: as asked, or what the validation part holds, at least one."""
        held = self.validation.window_count // config.training.global_batch_size
        return max(1, min(config.logging.eval_iters, held))

    def validation_bytes(self, config: RunConfig) -> int | None:
        """Bytes of text behind the targets of one validation."""
        if self.tokenizer is None:
            return None
        sizes = self.tokenizer.bytes_per_token()
        sizes = np.pad(sizes, (0, config.model.vocab_size - len(sizes)))  # ids that no piece stands for
        windows = range(self.validation_batches(config) * config.training.global_batch_size)
        return int(sum(np.take(sizes, self.validation.sample(k)[1:]).sum() for k in windows))


def cache_folder(data_cache_path: str) -> Path:
    """Where the built-in corpus is kept: as given, or in the user's cache folder (XDG)."""
    if data_cache_path:
        return Path(data_cache_path)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "megatron_nexus"


def open_corpus(config: RunConfig, mesh: Mesh, local_rank: int) -> Corpus:
    """Open the run's corpus; a collective call: one rank of each machine prepares the built-in one first.

    Raises:
        ConfigError: --tokenizer-model without --data-path.
        DataError: files that are missing, damaged or do not fit the model's vocabulary.
    """
    data, training = config.data, config.training
    model_path: Path | None
    if not data.data_path:
        if data.tokenizer_model:
            raise ConfigError(["--tokenizer-model belongs to a --data-path: give both, or neither"])
        cache = cache_folder(data.data_cache_path)
        made = prepare_default_corpus(cache, config.model.vocab_size) if local_rank == 0 else None
        offers: list[tuple[str, DefaultCorpus | None]] = [("", None)] * mesh.world_size
        dist.all_gather_object(offers, (socket.gethostname(), made), group=mesh.control)
        built_in = next(offer for host, offer in offers if offer and host == socket.gethostname())
        prefix, model_path = built_in.prefix, built_in.tokenizer_path
    else:
        prefix = Path(data.data_path)
        model_path = Path(data.tokenizer_model) if data.tokenizer_model else None
    tokenizer = open_tokenizer(model_path) if model_path else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {model_path} has {tokenizer.vocab_size} tokens, more than --vocab-size "
            f"{config.model.vocab_size}: use --vocab-size {tokenizer.vocab_size} or more"
        )
    dataset = IndexedDataset(prefix)
    fingerprint = tokenizer.fingerprint if tokenizer is not None else ""
    seen = set(
        exchange(mesh, f"{dataset.token_count} tokens, {dataset.document_count} documents {fingerprint}")
    )
    if len(seen) > 1:
        raise DataError(
            f"ranks read different data from {prefix} ({'; '.join(sorted(seen))}): copy one corpus"
        )
    splits = split_documents(dataset, data.split)
    tokens = splits.train.tokens
    corpus = Corpus(
        training=TokenWindows(dataset, splits.train, training.seq_length, training.seed),
        # The same samples at every validation of every run, whatever its seed.
        validation=TokenWindows(dataset, splits.validation, training.seq_length, seed=0),
        tokenizer=tokenizer,
        entropy=unigram_entropy(dataset, tokens.start, tokens.stop, config.model.vocab_size),
    )
    logger.info(
        "corpus %s: %s tokens in %s documents, %s for training; unigram entropy %.3f nats/token",
        prefix,
        f"{dataset.token_count:,}",
        f"{dataset.document_count:,}",
        f"{len(tokens):,}",
        corpus.entropy,
    )
    return corpus

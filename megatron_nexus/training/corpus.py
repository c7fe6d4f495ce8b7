"""Corpus: the samples of a run, what their tokens mean, and how hard they are without a model."""

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_nexus.checkpoint.agreement import exchange
from megatron_nexus.config.data_path import Source, parse_blend, parse_sets, parse_token_range
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.blend import LONGEST_PERIOD, Blend, whole_shares
from megatron_nexus.data.corpus_description import check_tokenizer, read_description
from megatron_nexus.data.default_corpus import DefaultCorpus, prepare_default_corpus
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.data.samples import SplitRange, Splits, TokenWindows, restrict, split_documents
from megatron_nexus.data.statistics import COUNTED_TOKENS, entropy, unigram_frequencies
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.errors import DataError
from megatron_nexus.log import logger
from megatron_nexus.parallel.mesh import Mesh


@dataclass(frozen=True)
class Corpus:
    """What a run reads. `tokenizer` is None where token files came without one."""

    training: Blend
    evaluations: Mapping[str, Blend]
    """What is validated on, and under "test" or "test <name>" what a finished run is tested on."""
    tokenizer: Tokenizer | None
    entropy: float
    """Of the training tokens without context, in nats per token."""
    description: str
    """The training data in words: shares, prefixes, tokens."""
    fingerprint: str
    """Of the training data and of all that decides the order of its samples, wherever its files lie."""

    def evaluation_batches(self, name: str, config: RunConfig) -> int:
        """Global batches of an evaluation: as asked, or what its set holds, at least one."""
        held = self.evaluations[name].epoch_samples // config.training.global_batch_size
        return max(1, min(config.logging.eval_iters, held))

    def evaluation_bytes(self, name: str, config: RunConfig) -> int | None:
        """Bytes of text behind the targets of one evaluation."""
        if self.tokenizer is None:
            return None
        sizes = self.tokenizer.bytes_per_token()
        sizes = np.pad(sizes, (0, config.model.vocab_size - len(sizes)))  # ids that no piece stands for
        samples = range(self.evaluation_batches(name, config) * config.training.global_batch_size)
        return int(sum(np.take(sizes, self.evaluations[name].sample(k)[1:]).sum() for k in samples))

    def epochs(self, samples: int) -> list[str]:
        """A line for each corpus that gives a window more than once in the first `samples`."""
        lines = []
        counts = self.training.counts(samples).tolist()
        for part, count in zip(self.training.parts, counts, strict=True):
            if count > part.window_count:
                lines.append(
                    f"corpus {part.dataset.prefix}: {count / part.window_count:.2f} epochs, {count:,} "
                    f"samples of its {part.window_count:,}, each epoch in an order of its own"
                )
        return lines


def cache_folder(data_cache_path: str) -> Path:
    """Where the built-in corpus is kept: as given, or in the user's cache folder (XDG)."""
    if data_cache_path:
        return Path(data_cache_path)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "megatron_nexus"


def open_corpus(config: RunConfig, mesh: Mesh, local_rank: int) -> Corpus:
    """Open the run's data; a collective call: one rank of each machine prepares the built-in corpus first.

    Raises:
        DataError: files that are missing, damaged, too short or do not fit the model's vocabulary.
    """
    data = config.data
    sources = parse_blend("--data-path", data.data_path or data.train_data_path)
    model_path = Path(data.tokenizer_model) if data.tokenizer_model else None
    if not sources:
        built_in = _built_in(config, mesh, local_rank)
        sources, model_path = (Source(built_in.prefix, None),), built_in.tokenizer_path
    tokenizer = open_tokenizer(model_path) if model_path else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the tokenizer {model_path} has {tokenizer.vocab_size} tokens, more than --vocab-size "
            f"{config.model.vocab_size}: use --vocab-size {tokenizer.vocab_size} or more"
        )
    library = _Library(config, tokenizer)
    training = library.training(sources)
    if data.valid_data_path:
        held_out = parse_sets("--valid-data-path", "validation", data.valid_data_path)
        evaluations = {name: library.whole(name, blend) for name, blend in held_out.items()}
    else:
        evaluations = {"validation": library.validation(sources)}
    tests = parse_sets("--test-data-path", "test", data.test_data_path)
    evaluations |= {name: library.whole(name, blend) for name, blend in tests.items()}
    _require_same_data(library, tokenizer, mesh)
    corpus = Corpus(
        training=training,
        evaluations=evaluations,
        tokenizer=tokenizer,
        entropy=_blend_entropy(training, config.model.vocab_size),
        description=", ".join(
            f"{share / sum(training.shares):.4g} {part.dataset.prefix} "
            f"{part.split.tokens.start:,}:{part.split.tokens.stop:,}"
            for part, share in zip(training.parts, training.shares, strict=True)
        ),
        fingerprint=library.order_fingerprint(training),
    )
    for part, share in zip(training.parts, training.shares, strict=True):
        logger.info(
            "corpus %s: %s tokens in %s documents, %s for training, %.4g %% of the samples",
            part.dataset.prefix,
            f"{part.dataset.token_count:,}",
            f"{part.dataset.document_count:,}",
            f"{len(part.split.tokens):,}",
            100 * share / sum(training.shares),
        )
    logger.info("unigram entropy of the training data: %.3f nats/token", corpus.entropy)
    return corpus


def _built_in(config: RunConfig, mesh: Mesh, local_rank: int) -> DefaultCorpus:
    """The built-in corpus of this machine, prepared by one of its ranks; a collective call."""
    cache = cache_folder(config.data.data_cache_path)
    made = prepare_default_corpus(cache, config.model.vocab_size) if local_rank == 0 else None
    offers: list[tuple[str, DefaultCorpus | None]] = [("", None)] * mesh.world_size
    dist.all_gather_object(offers, (socket.gethostname(), made), group=mesh.control)
    return next(offer for host, offer in offers if offer and host == socket.gethostname())


class _Library:
    """The corpora of a run, each opened once, and the blends that are made of them."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer | None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self.datasets: dict[Path, IndexedDataset] = {}

    def _open(self, prefix: Path) -> IndexedDataset:
        if prefix not in self.datasets:
            self.datasets[prefix] = IndexedDataset(prefix)
            if self._tokenizer is not None:
                check_tokenizer(prefix, self._tokenizer)
            description, vocab_size = read_description(prefix), self._config.model.vocab_size
            if description is not None and description.vocab_size > vocab_size:
                raise DataError(
                    f"{prefix} was written with a vocabulary of {description.vocab_size} tokens, more than "
                    f"--vocab-size {vocab_size}: use --vocab-size {description.vocab_size} or more"
                )
        return self.datasets[prefix]

    def _parts(self, sources: Sequence[Source]) -> list[Splits]:
        """The parts of each corpus to train on; all of it is for training under --train-data-path."""
        split = self._config.data.split if not self._config.data.train_data_path else "1"
        return [split_documents(self._open(source.prefix), split) for source in sources]

    def training(self, sources: Sequence[Source]) -> Blend:
        """What is trained on: of each corpus its training part, and of that its share of --data-range."""
        parts = [splits.train for splits in self._parts(sources)]
        shares = _shares(sources, parts)
        text = self._config.data.data_range
        if text:
            first, last = parse_token_range(text)
            fractions = [Fraction(share, sum(shares)) for share in shares]
            parts = [
                restrict(self._open(source.prefix), part, fraction, first, last)
                for source, part, fraction in zip(sources, parts, fractions, strict=True)
            ]
        # Each corpus is shuffled by a seed of its own; that of the first is the run's.
        return self._blend(sources, parts, shares, self._config.training.seed)

    def validation(self, sources: Sequence[Source]) -> Blend:
        """The validation parts of what is trained on, in its shares."""
        splits = self._parts(sources)
        shares = _shares(sources, [split.train for split in splits])
        return self._blend(sources, [split.validation for split in splits], shares, seed=0)

    def whole(self, name: str, sources: Sequence[Source]) -> Blend:
        """A set of an evaluation: all of its corpora."""
        parts = [SplitRange(name, range(self._open(source.prefix).token_count)) for source in sources]
        return self._blend(sources, parts, _shares(sources, parts), seed=0)

    def _blend(
        self, sources: Sequence[Source], parts: Sequence[SplitRange], shares: Sequence[int], seed: int
    ) -> Blend:
        """Evaluations have the seed 0: the same samples at every one of every run, whatever its seed."""
        length, vocab_size = self._config.training.seq_length, self._config.model.vocab_size
        return Blend(
            [
                TokenWindows(self._open(source.prefix), part, length, seed + d, vocab_size)
                for d, (source, part) in enumerate(zip(sources, parts, strict=True))
            ],
            shares,
        )

    def order_fingerprint(self, blend: Blend) -> str:
        """sha256 of the training data and of what decides the order of its samples."""
        training = self._config.training
        facts = [training.seed, training.seq_length] + [
            [share, part.dataset.fingerprint, part.split.tokens.start, part.split.tokens.stop]
            for part, share in zip(blend.parts, blend.shares, strict=True)
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _shares(sources: Sequence[Source], parts: Sequence[SplitRange]) -> tuple[int, ...]:
    """The corpora's shares as whole numbers.

    Raises:
        DataError: one is too small to be served.
    """
    weights = [
        Fraction(len(part.tokens)) if source.weight is None else source.weight
        for source, part in zip(sources, parts, strict=True)
    ]
    shares = whole_shares(weights) if sum(weights) else (0,) * len(weights)
    for source, share, weight in zip(sources, shares, weights, strict=True):
        if share == 0:
            raise DataError(
                f"{source.prefix} would give {float(weight / (sum(weights) or 1)):.2g} of the samples, the "
                f"least is {1 / LONGEST_PERIOD}: leave it out, or give it a larger weight"
            )
    return shares


def _require_same_data(library: _Library, tokenizer: Tokenizer | None, mesh: Mesh) -> None:
    """Raise DataError where ranks read different data; a collective call."""
    contents = [dataset.fingerprint for dataset in library.datasets.values()]
    mine = hashlib.sha256(json.dumps([contents, tokenizer and tokenizer.fingerprint]).encode()).hexdigest()
    seen = exchange(mesh, mine)
    if len(set(seen)) > 1:
        other = next(rank for rank, theirs in enumerate(seen) if theirs != seen[0])
        names = ", ".join(map(str, library.datasets))
        raise DataError(
            f"ranks 0 and {other} read different data from {names}, or have different tokenizers: "
            "copy one corpus to all machines, or use a disk that they share"
        )


def _blend_entropy(blend: Blend, vocab_size: int) -> float:
    """Unigram entropy of a blend: that of its corpora's frequencies, averaged by their shares."""
    mixed = np.zeros(vocab_size)
    for part, share in zip(blend.parts, blend.shares, strict=True):
        tokens = part.split.tokens
        limit = max(1, COUNTED_TOKENS // len(blend.parts))
        counted = unigram_frequencies(part.dataset, tokens.start, tokens.stop, vocab_size, limit)
        mixed += share / sum(blend.shares) * counted
    return entropy(mixed)

"""Corpus: the samples of a run, what their tokens mean, and how hard they are without a model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_nexus.checkpoint.manifest import JsonObject
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.data_path import Source
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.blend import Blend
from megatron_nexus.data.default_corpus import DefaultCorpus, cache_folder, prepare_default_corpus
from megatron_nexus.data.inspection import COUNTED_TOKENS, entropy, unigram_frequencies
from megatron_nexus.data.run_data import RunData, tokenizer_path, training_sources
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.data.tokenizer_record import NO_RECORD, TokenizerRecord
from megatron_nexus.data.unlearning_samples import UnlearningSamples
from megatron_nexus.errors import DataError
from megatron_nexus.log import logger
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.answer_batches import AnswerBatches


@dataclass(frozen=True)
class Corpus:
    """What a run reads. `tokenizer` is None where token files came without one."""

    training: Blend | AnswerBatches
    evaluations: Mapping[str, Blend]
    """What is validated on, and under "test" or "test <name>" what a finished run is tested on."""
    tokenizer: Tokenizer | None
    entropy: float | None
    """Unigram entropy of the training tokens, nats per token; None for answers to unlearn."""
    description: str
    """The training data in words: shares, prefixes, tokens."""
    fingerprint: str
    """Hash of the training data and of all that decides the order of its samples, but not of paths."""
    tokenizer_fingerprint: str
    """Of the tokenizer that the data, or else the checkpoint that the run starts from, was written with."""
    prepend_bos: bool | None = None
    """Whether the documents begin with BOS, as checkpoints keep it; None: as the tokenizer's files say."""

    def sample_tokens(self, config: RunConfig) -> int:
        """Return the tokens of a sample, with padding: --seq-length, or fewer of answers to unlearn."""
        if isinstance(self.training, AnswerBatches):
            return self.training.samples.width
        return config.training.seq_length

    def evaluation_batches(self, name: str, config: RunConfig) -> int:
        """Global batches of an evaluation: as asked, or what its set holds, at least one."""
        held = self.evaluations[name].epoch_samples // config.training.global_batch_size
        return max(1, min(config.logging.eval_iters, held))

    def evaluation_bytes(self, name: str, config: RunConfig) -> int | None:
        """Return bytes of text behind the targets of one evaluation."""
        if self.tokenizer is None:
            return None
        sizes = self.tokenizer.bytes_per_token()
        sizes = np.pad(sizes, (0, config.model.vocab_size - len(sizes)))  # ids that no piece stands for
        samples = range(self.evaluation_batches(name, config) * config.training.global_batch_size)
        return int(sum(np.take(sizes, self.evaluations[name].sample(k)[1:]).sum() for k in samples))

    def epochs(self, samples: int) -> list[str]:
        """Return a line for each corpus that gives a window more than once in the first `samples`."""
        if isinstance(self.training, AnswerBatches):
            return self.training.samples.epochs(samples)
        lines = []
        counts = self.training.counts(samples).tolist()
        for part, count in zip(self.training.parts, counts, strict=True):
            if count > part.window_count:
                lines.append(
                    f"corpus {part.dataset.prefix}: {count / part.window_count:.2f} epochs, {count:,} "
                    f"samples of its {part.window_count:,}, each epoch in an order of its own"
                )
        return lines


def data_changes(before: JsonObject, config: RunConfig, description: str, was: str) -> list[str]:
    """Return how the order or the content of the training data differs from a checkpoint's.

    `before` is the configuration of the checkpoint, `was` the description of its data.
    """
    flags = {"training": ("seq_length", "seed"), "data": ("tokenizer_model", "split", "data_range")}
    changes = []
    for section, names in flags.items():
        values = before.get(section)
        for name in names:
            now = getattr(getattr(config, section), name)
            old = values.get(name, now) if isinstance(values, Mapping) else now
            if old != now:
                changes.append(f"{flag_of(name)} {now}, was {old or 'not given'}")
    if description != was and "split" not in "".join(changes) and "data-range" not in "".join(changes):
        changes.append(f"other documents: {description}, was {was}")
    return changes or ["the content of its files, under the same names and with as many tokens"]


def open_corpus(
    config: RunConfig,
    mesh: Mesh,
    local_rank: int,
    record: TokenizerRecord = NO_RECORD,
    run_data: RunData | None = None,
) -> Corpus:
    """Open the run's data; a collective call: one rank of each machine prepares the built-in corpus first.

    `record` is what the checkpoint that the run starts from keeps of its tokenizer; `run_data` the files that
    the run reads, where they are open already.

    Raises DataError: files that are missing, damaged, too short, do not fit the model's vocabulary or are of
    another tokenizer than the checkpoint.
    """
    if run_data is None and (sources := training_sources(config.data)):
        run_data = RunData(config, sources, tokenizer_path(config.data))
    if run_data is None:
        built_in = _built_in(config, mesh, local_rank, record)
        source = Source(built_in.prefix, None)
        run_data = RunData(config, (source,), built_in.tokenizer_path, built_in.prepend_bos)
    training = run_data.training
    _require_same_data(run_data, mesh)
    run_data.require_tokenizer(record)
    prepend_bos = _prepend_bos(run_data, record)
    tokenizer = run_data.tokenizer
    if tokenizer is not None and prepend_bos is not None:
        tokenizer = tokenizer.with_bos(prepend_bos)
    corpus = Corpus(
        training=training,
        evaluations=run_data.evaluations,
        tokenizer=tokenizer,
        entropy=_blend_entropy(training, config.model.vocab_size),
        description=", ".join(
            f"{share / sum(training.shares):.4g} {part.dataset.prefix} "
            f"{part.split.tokens.start:,}:{part.split.tokens.stop:,}"
            for part, share in zip(training.parts, training.shares, strict=True)
        ),
        fingerprint=run_data.order_fingerprint(),
        tokenizer_fingerprint=run_data.tokenizer_fingerprint or record.fingerprint,
        prepend_bos=prepend_bos,
    )
    _log_contents(run_data, config)
    logger.info("unigram entropy of the training data: %.3f nats/token", corpus.entropy)
    return corpus


def _log_contents(run_data: RunData, config: RunConfig) -> None:
    """Log what each corpus of a blend holds, and what there is no validation on."""
    training = run_data.training
    for part, share in zip(training.parts, training.shares, strict=True):
        dataset = part.dataset
        logger.info(
            f"corpus {dataset.prefix}: {dataset.token_count:,} tokens in {dataset.document_count:,} "
            f"documents, {len(part.split.tokens):,} for training, "
            f"{100 * share / sum(training.shares):.4g} % of the samples"
        )
    split = config.data.split
    for prefix in run_data.without_validation:
        logger.info(
            f"note: --split {split} leaves {prefix} no sample for validation: the rest of the blend is "
            "validated on"
        )
    if not run_data.evaluations:
        iters = config.logging.eval_iters
        logger.info(f"note: there is no validation (--split {split}, --eval-iters {iters})")


def open_answers(samples: UnlearningSamples, mesh: Mesh, record: TokenizerRecord) -> Corpus:
    """Return what an unlearning run reads; a collective call. Raises DataError where ranks differ in it."""
    seen = mesh.control.distinct_str(samples.fingerprint)
    if len(seen) > 1:
        one, other = sorted(seen.values())[:2]
        raise DataError(
            f"ranks {one} and {other} read different samples from --forget and --retain: copy the files to "
            "all machines, or use a disk that they share"
        )
    logger.info("samples: %s", samples.description)
    return Corpus(
        training=AnswerBatches(samples),
        evaluations={},
        tokenizer=samples.tokenizer,
        entropy=None,
        description=samples.description,
        fingerprint=samples.fingerprint,
        tokenizer_fingerprint=samples.tokenizer.fingerprint,
        prepend_bos=record.prepend_bos,
    )


def _prepend_bos(run_data: RunData, record: TokenizerRecord) -> bool | None:
    """What the checkpoints of this run keep: whether documents begin with BOS; warns where it changes."""
    tokenizer, found = run_data.tokenizer, run_data.prepend_bos
    if found is None:
        return record.prepend_bos
    own = tokenizer is not None and bool(tokenizer.document_prefix)
    before = own if record.prepend_bos is None else record.prepend_bos
    if record.fingerprint and found != before:
        here, there = ("begin", "do not") if found else ("do not begin", "do")
        logger.warning(
            f"the documents of this corpus {here} with BOS, those of the checkpoint {there}: unless that is "
            f"meant, preprocess the corpus again with --{'no-' if found else ''}prepend-bos"
        )
    # An import goes on as its tokenizer says, which may name a BOS token that begins no document.
    return None if record.fingerprint and record.prepend_bos is None and found == own else found


def _built_in(config: RunConfig, mesh: Mesh, local_rank: int, record: TokenizerRecord) -> DefaultCorpus:
    """Return the built-in corpus, in the tokens of the flags or the checkpoint; a collective call."""
    cache = cache_folder(config.data.data_cache_path)
    made = None
    if local_rank == 0:
        path = tokenizer_path(config.data)
        if path is not None:
            tokenizer: Tokenizer | None = open_tokenizer(path, record.prepend_bos)
        else:
            tokenizer = find_tokenizer(config, record)
        made = prepare_default_corpus(cache, config.model.vocab_size, tokenizer=tokenizer)
    offers = mesh.control.gather_str_on_host(made.to_json() if made else "")
    return DefaultCorpus.from_json(next(filter(None, offers)))


def _require_same_data(run_data: RunData, mesh: Mesh) -> None:
    """Raise DataError where ranks read different data; a collective call."""
    contents = [dataset.fingerprint for dataset in run_data.datasets.values()]
    tokenizer = run_data.tokenizer and run_data.tokenizer.fingerprint
    mine = hashlib.sha256(json.dumps([contents, tokenizer]).encode()).hexdigest()
    seen = mesh.control.distinct_str(mine)
    if len(seen) > 1:
        one, other = sorted(seen.values())[:2]
        names = ", ".join(map(str, run_data.datasets))
        raise DataError(
            f"ranks {one} and {other} read different data from {names}, or have different tokenizers: "
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

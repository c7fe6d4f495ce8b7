"""The samples of an unlearning run: answers to forget and answers to retain, each in an order of its own.

The k-th sample is a function of (seed, k). Where both sets have a loss they take turns, forget first, so that
each global batch holds as many of one as of the other, and every set is read epoch by epoch.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answers import AnswerTokens, read_answers, tokenize_answers
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.data.samples import permutation
from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.data.tokenizer_record import TokenizerRecord
from megatron_nexus.errors import DataError
from megatron_nexus.log import logger

FORGET, RETAIN = "forget", "retain"
WIDTH_MULTIPLE = 8
"""Divisor of a tensor-parallel rank's share of the width of a micro-batch: what the GEMMs of GPUs like."""


@dataclass(frozen=True)
class UnlearningSamples:
    """The answers of both sets, of which the retain set may be empty."""

    sets: Mapping[str, Sequence[AnswerTokens]]
    """Samples by the names FORGET and, where it has a loss, RETAIN."""
    tokenizer: Tokenizer
    seq_length: int
    seed: int
    multiple: int = 1
    """Divisor of the width of a micro-batch, as --sequence-parallel needs."""

    @cached_property
    def width(self) -> int:
        """Tokens to which samples are padded, --seq-length or fewer: what holds the longest."""
        longest = max(len(answer.tokens) for answers in self.sets.values() for answer in answers)
        return min(self.seq_length, -(-longest // self.multiple) * self.multiple)

    def place(self, k: int) -> tuple[str, int]:
        """Return the set of the k-th sample of the run, and its number there."""
        name = list(self.sets)[k % len(self.sets)]
        epoch, index = divmod(k // len(self.sets), len(self.sets[name]))
        return name, permutation(len(self.sets[name]), self.seed + (name == RETAIN), epoch)[index]

    def epochs(self, samples: int) -> list[str]:
        """Return a line for each set that is read more than once in the first `samples`."""
        counts = {name: samples / len(self.sets) / len(answers) for name, answers in self.sets.items()}
        return [f"{name} set: {count:.2f} epochs" for name, count in counts.items() if count > 1]

    @property
    def description(self) -> str:
        """The samples in words."""
        return ", ".join(f"{len(answers):,} to {name}" for name, answers in self.sets.items())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the samples' tokens and of what decides their order."""
        facts = [self.seed, self.seq_length]
        contents = {name: [[a.ids, a.answer_start] for a in answers] for name, answers in self.sets.items()}
        return hashlib.sha256(json.dumps([facts, contents]).encode()).hexdigest()


def read_unlearning_samples(config: RunConfig, record: TokenizerRecord) -> UnlearningSamples:
    """Read the samples that a run unlearns and retains, in the tokens of the checkpoint's tokenizer.

    Raises DataError: a file is empty or not of prompts and answers; an answer is longer than a
    sample; or the checkpoint knows no tokenizer.
    """
    unlearning, seq_length = config.unlearning, config.training.seq_length
    tokenizer = find_tokenizer(config, record)
    if tokenizer is None:
        raise DataError(
            f"the checkpoint of --load {config.checkpoint.load} knows no tokenizer, and --forget "
            f"{unlearning.forget} is text: give the one that it was trained with as --tokenizer-model"
        )
    sets = {}
    for name, file in {FORGET: unlearning.forget, RETAIN: unlearning.retain}.items():
        if file:
            sets[name], cut = tokenize_answers(read_answers(Path(file)), tokenizer, seq_length)
            if cut:
                logger.info(
                    f"note: of {cut} of {len(sets[name])} samples of --{name} {file} what exceeds "
                    f"--seq-length {seq_length} is cut off"
                )
    if RETAIN in sets:
        _check_overlap(sets, unlearning.forget, unlearning.retain)
    multiple = WIDTH_MULTIPLE * config.parallel.tensor_model_parallel_size
    return UnlearningSamples(sets, tokenizer, seq_length, config.training.seed, multiple)


def _check_overlap(sets: Mapping[str, Sequence[AnswerTokens]], forget: str, retain: str) -> None:
    """Tell of samples that are to be forgotten and retained. Raises DataError where all to forget are."""
    retained = set(sets[RETAIN])
    both = sum(answer in retained for answer in sets[FORGET])
    if both == len(sets[FORGET]):
        raise DataError(
            f"all {both:,} samples of --forget {forget} are in --retain {retain}, too: their losses are "
            "opposed: remove them from one of the files"
        )
    if both:
        logger.warning(
            f"{both} of {len(sets[FORGET])} samples of --forget {forget} are in --retain {retain}, too: "
            "their losses are opposed"
        )

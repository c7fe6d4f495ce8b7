"""RunData: the corpora that a configuration names, each opened once, and the blends that are made of them.

Needs no torch and no process group: a wrong file is answered before anything is started.
"""

import hashlib
import json
from collections.abc import Sequence
from errno import EMFILE
from fractions import Fraction
from itertools import compress
from pathlib import Path

from megatron_nexus.base.open_files import allow_open_files
from megatron_nexus.config.data_path import Source, parse_blend, parse_sets, parse_token_range
from megatron_nexus.config.files_config import DataConfig
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.blend import LONGEST_PERIOD, Blend, whole_shares
from megatron_nexus.data.corpus_description import (
    CorpusDescription,
    begins_with,
    check_tokenizer,
    read_description,
)
from megatron_nexus.data.indexed_dataset import IndexedDataset
from megatron_nexus.data.samples import (
    SplitRange,
    Splits,
    TokenWindows,
    restrict,
    split_documents,
    split_shares,
)
from megatron_nexus.data.tokenizer import open_tokenizer
from megatron_nexus.data.tokenizer_record import TokenizerRecord
from megatron_nexus.errors import DataError


def training_sources(data: DataConfig) -> tuple[Source, ...]:
    """Return the corpora that the flags name to train on; none: the built-in one."""
    return parse_blend("--data-path", data.data_path or data.train_data_path)


def tokenizer_path(data: DataConfig) -> Path | None:
    """Return the tokenizer that the flags name."""
    return Path(data.tokenizer_model) if data.tokenizer_model else None


class RunData:
    """The corpora of a run, each opened once, and the blends that are made of them."""

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[Source],
        tokenizer_path: Path | None,
        prepend_bos: bool | None = None,
    ) -> None:
        """Open what `sources` and the flags of validation and test name.

        `prepend_bos`: whether their documents begin with BOS; None: as their descriptions and tokens say.

        Raises DataError: files that are missing, damaged, too short or do not fit the model's vocabulary, or
        of which some begin their documents with BOS and others do not.
        """
        self._config = config
        self.tokenizer = open_tokenizer(tokenizer_path) if tokenizer_path else None
        if self.tokenizer is not None and (needed := self.tokenizer.vocab_size) > config.model.vocab_size:
            raise DataError(
                f"the tokenizer {tokenizer_path} has {needed} tokens, more than --vocab-size "
                f"{config.model.vocab_size}: use --vocab-size {needed} or more"
            )
        self.datasets: dict[Path, IndexedDataset] = {}
        self._descriptions: dict[Path, CorpusDescription] = {}
        self.training = self._training(sources)
        self.without_validation: list[Path] = []
        """Corpora of the blend that --split leaves no sample to validate on, where others have some."""
        self.evaluations = self._evaluations(sources) if config.logging.eval_iters else {}
        self.prepend_bos = self._begin_with_bos() if prepend_bos is None else prepend_bos
        self.tokenizer_fingerprint = self._written_with()
        """`Tokenizer.fingerprint` of what wrote the corpora; empty where none of them says."""

    def require_tokenizer(self, record: TokenizerRecord) -> None:
        """Raise DataError where the corpora are of another tokenizer than the checkpoint's."""
        mine = self.tokenizer_fingerprint
        if mine and record.fingerprint not in ("", mine):
            names = ", ".join(map(str, self.datasets))
            raise DataError(
                f"{names}: written with another tokenizer (sha256 {mine[:12]}) than the checkpoint was "
                f"trained with ({record.fingerprint[:12]}), so token ids would mean something else: "
                "preprocess the text with that one, or train another model"
            )

    def _open(self, prefix: Path) -> IndexedDataset:
        if prefix not in self.datasets:
            allow_open_files(2 * len(self.datasets) + 2)
            try:
                self.datasets[prefix] = IndexedDataset(prefix)
            except OSError as error:
                remedy = (
                    "raise the limit (ulimit -n), or merge corpora"
                    if error.errno == EMFILE
                    else "make it readable, or give another"
                )
                raise DataError(f"{prefix} cannot be opened ({error.strerror}): {remedy}") from error
            if self.tokenizer is not None:
                check_tokenizer(prefix, self.tokenizer)
            if (description := read_description(prefix)) is not None:
                self._descriptions[prefix] = description
                if (needed := description.vocab_size) > (size := self._config.model.vocab_size):
                    raise DataError(
                        f"{prefix} was written with a vocabulary of {needed} tokens, more than --vocab-size "
                        f"{size}: use --vocab-size {needed} or more"
                    )
        return self.datasets[prefix]

    def _written_with(self) -> str:
        """Return the fingerprint of the corpora's tokenizer, as far as they say. Raises DataError."""
        if self.tokenizer is not None:
            return self.tokenizer.fingerprint
        described = {found.tokenizer_fingerprint: prefix for prefix, found in self._descriptions.items()}
        if len(described) > 1:
            one, other, *_ = described.values()
            raise DataError(
                f"{one} and {other} were written with two tokenizers, so one id means two things: preprocess "
                "one of them again with the tokenizer of the other"
            )
        return next(iter(described), "")

    def _begin_with_bos(self) -> bool | None:
        """Return whether the documents begin with BOS, or None where it is unknown. Raises DataError."""
        described = {prefix: found.prepend_bos for prefix, found in self._descriptions.items()}
        if len(set(described.values())) > 1:
            having, *_, lacking = sorted(described, key=lambda prefix: not described[prefix])
            raise DataError(
                f"the documents of {having} begin with BOS, those of {lacking} do not, and a model learns "
                "one of the two: preprocess one of them again, with --no-prepend-bos or --prepend-bos"
            )
        if described:
            return next(iter(described.values()))
        if self.tokenizer is None:
            return None
        return all(begins_with(dataset, self.tokenizer.bos_id) for dataset in self.datasets.values())

    def _parts(self, sources: Sequence[Source]) -> list[Splits]:
        """Return the parts of each corpus to train on: all of it under --train-data-path."""
        split = self._config.data.split if not self._config.data.train_data_path else "1"
        return [split_documents(self._open(source.prefix), split) for source in sources]

    def _training(self, sources: Sequence[Source]) -> Blend:
        """Return the blend to train on: of each training part its share of --data-range."""
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

    def _evaluations(self, sources: Sequence[Source]) -> dict[str, Blend]:
        """Return the data to validate on, and that a finished run is tested on, by name."""
        data = self._config.data
        held_out = parse_sets("--valid-data-path", "validation", data.valid_data_path)
        tests = parse_sets("--test-data-path", "test", data.test_data_path)
        evaluations = {}
        for name, whole in {**held_out, **tests}.items():
            parts = [SplitRange(name, range(self._open(source.prefix).token_count)) for source in whole]
            evaluations[name] = self._blend(whole, parts, _shares(whole, parts), seed=0)
        if not held_out and (validation := self._validation(sources)):
            evaluations = {"validation": validation, **evaluations}
        return evaluations

    def _validation(self, sources: Sequence[Source]) -> Blend | None:
        """Return the validation parts of the training data, in its shares; None where --split has none."""
        if not split_shares(self._config.data.split)[1]:
            return None
        splits = self._parts(sources)
        shares = _shares(sources, [split.train for split in splits])
        needed = self._config.training.seq_length + 1
        held = [len(split.validation.tokens) >= needed for split in splits]
        if any(held):
            self.without_validation = [s.prefix for s, h in zip(sources, held, strict=True) if not h]
        else:
            held = [True] * len(held)  # the first is refused with its remedies
        parts = [split.validation for split in splits]
        return self._blend(
            list(compress(sources, held)), list(compress(parts, held)), list(compress(shares, held)), seed=0
        )

    def _blend(
        self, sources: Sequence[Source], parts: Sequence[SplitRange], shares: Sequence[int], seed: int
    ) -> Blend:
        """Return a blend; evaluations have seed 0, so that every run validates on the same samples."""
        length, vocab_size = self._config.training.seq_length, self._config.model.vocab_size
        return Blend(
            [
                TokenWindows(self._open(source.prefix), part, length, seed + d, vocab_size)
                for d, (source, part) in enumerate(zip(sources, parts, strict=True))
            ],
            shares,
        )

    def order_fingerprint(self) -> str:
        """Return sha256 of the training data and of what decides the order of its samples."""
        training = self._config.training
        facts = [training.seed, training.seq_length] + [
            [share, part.dataset.fingerprint, part.split.tokens.start, part.split.tokens.stop]
            for part, share in zip(self.training.parts, self.training.shares, strict=True)
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _shares(sources: Sequence[Source], parts: Sequence[SplitRange]) -> tuple[int, ...]:
    """Return the corpora's shares as whole numbers. Raises DataError: one is too small to be served."""
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

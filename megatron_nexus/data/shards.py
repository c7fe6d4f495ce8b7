"""Shards: the unit in which documents are tokenized, kept over a restart and merged.

A finished shard is a folder with a `.bin` / `.idx` pair and its counts, named after everything that decides
its contents: inputs, their sizes and dates, tokenizer, options. It appears when it is complete, and a run
finds those of an earlier one that it can use by their names alone.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.durable import atomic_dir
from megatron_nexus.base.json_text import parse_json, record_of
from megatron_nexus.base.workers import start_server, worker_pool
from megatron_nexus.data.corpus_description import first_change
from megatron_nexus.data.documents import BadRecord, Document, FileSlice, RecordFormat, read_slice
from megatron_nexus.data.indexed_dataset import (
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    index_bytes,
    json_path,
    token_dtype,
)
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.errors import DataError

FORMAT_VERSION = 1
"""Part of the names: raise it when the same inputs would give other shards."""

PREFIX = "tokens"
SAMPLES = 10
"""Malformed records kept of each shard."""

BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 1 << 12
"""What is tokenized and written at a time, whichever is reached first."""

POLL_INTERVAL_S = 0.5


@dataclass(frozen=True)
class InputShard:
    """Neighbouring spans, tokenized as one."""

    slices: tuple[FileSlice, ...]

    @property
    def size(self) -> int:
        """Its work, in the bytes of its spans."""
        return sum(file_slice.size for file_slice in self.slices)


@dataclass(frozen=True)
class TokenizeConfig:
    """How documents become tokens; the same on all ranks."""

    folder: Path
    """Where shards are kept."""
    tokenizer_path: Path
    reading: RecordFormat
    append_eod: bool
    strict: bool
    """The first malformed record is an error."""
    prepend_bos: bool | None = None
    """Whether documents begin with BOS; None: as the tokenizer's own files say."""


@dataclass
class ShardStats:
    """What went into a shard, or into several."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    malformed: dict[str, int] = dataclasses.field(default_factory=dict)
    """Records by what is wrong with them."""
    samples: list[tuple[int, int, str, str]] = dataclasses.field(default_factory=list)
    """The first malformed records: span, number, reason, excerpt."""
    unknown: int = 0
    """Tokens that stand for what the vocabulary lacks."""
    changed: int = 0
    """Documents that do not come back from their tokens as they were."""
    changed_example: list[str] = dataclasses.field(default_factory=list)
    """Where the first of them changes: before and after."""

    def add(self, other: "ShardStats") -> None:
        """Add the counts of another shard, which keeps its samples."""
        for name in ("documents", "tokens", "text_bytes", "empty", "unknown", "changed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.malformed = dict(Counter(self.malformed) + Counter(other.malformed))
        self.changed_example = self.changed_example or other.changed_example

    def sampled(self, shard: InputShard) -> list[BadRecord]:
        """Return the samples as records of `shard`."""
        return [BadRecord(shard.slices[file_slice], *rest) for file_slice, *rest in self.samples]  # type: ignore[arg-type]


def make_shards(slices: list[FileSlice], shard_bytes: int) -> list[InputShard]:
    """Put neighbouring spans together until they have `shard_bytes`."""
    shards: list[InputShard] = []
    waiting: list[FileSlice] = []
    size = 0
    for file_slice in slices:
        if waiting and size + file_slice.size > shard_bytes:
            shards.append(InputShard(tuple(waiting)))
            waiting, size = [], 0
        waiting.append(file_slice)
        size += file_slice.size
    return [*shards, InputShard(tuple(waiting))] if waiting else shards


def shard_prefix(shard: InputShard, tokenizing: TokenizeConfig, tokenizer: Tokenizer) -> Path:
    """Return the prefix of a shard's files, which are alone in their folder."""
    facts = (
        FORMAT_VERSION,
        tokenizer.fingerprint,
        # Those without BOS keep the names that they had before there was a choice.
        (tokenizing.append_eod, tokenizer.document_prefix)
        if tokenizer.document_prefix
        else tokenizing.append_eod,
        dataclasses.astuple(tokenizing.reading),
        [
            (
                str(file_slice.file.path.resolve()),
                file_slice.file.size,
                file_slice.file.modified_ns,
                file_slice.start,
                file_slice.stop,
            )
            for file_slice in shard.slices
        ],
    )
    return tokenizing.folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:32] / PREFIX


def finished_stats(prefix: Path, itemsize: int) -> ShardStats | None:
    """Return the counts of a shard that is finished and whole; tokens take `itemsize` bytes."""
    try:
        sizes = idx_path(prefix).stat().st_size, bin_path(prefix).stat().st_size
        counts = record_of(ShardStats, parse_json(json_path(prefix).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    whole = (index_bytes(counts.documents, counts.documents + 1), counts.tokens * itemsize)
    return counts if sizes == whole else None


def tokenize_shard(
    shard: InputShard, tokenizing: TokenizeConfig, tokenizer: Tokenizer, prefix: Path
) -> ShardStats:
    """Tokenize a shard and write it to `prefix`, in a folder that the caller makes durable.

    Raises DataError: a file cannot be read, or under `strict` a malformed record; OSError of the writing.
    """
    stats = ShardStats()
    with IndexedDatasetWriter(prefix, token_dtype(tokenizer.vocab_size), in_draft=True) as writer:
        batch: list[Document] = []
        batch_bytes = 0
        for place, file_slice in enumerate(shard.slices):
            for record in read_slice(file_slice, tokenizing.reading):
                if isinstance(record, Document):
                    batch.append(record)
                    batch_bytes += record.size
                    if batch_bytes >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
                        _write_batch(batch, writer, stats, tokenizer, tokenizing.append_eod)
                        batch, batch_bytes = [], 0
                    continue
                if tokenizing.strict:
                    raise DataError(
                        f"{record.describe()}: fix or remove the record, or leave it out by running "
                        "without --strict"
                    )
                stats.malformed[record.reason] = stats.malformed.get(record.reason, 0) + 1
                if len(stats.samples) < SAMPLES:
                    stats.samples.append((place, record.number, record.reason, record.excerpt))
        _write_batch(batch, writer, stats, tokenizer, tokenizing.append_eod)
        writer.description = json.dumps(dataclasses.asdict(stats))
    return stats


def _write_batch(
    batch: list[Document],
    writer: IndexedDatasetWriter,
    stats: ShardStats,
    tokenizer: Tokenizer,
    append_eod: bool,
) -> None:
    """Tokenize and write documents, and count them in `stats`."""
    begin = np.array(tokenizer.document_prefix, dtype=np.int32)
    end = np.array([tokenizer.eod_id] if append_eod else [], dtype=np.int32)
    lengths: list[int] = []
    parts: list[npt.NDArray[np.int32]] = []
    encoded = tokenizer.encode_documents([document.text for document in batch], threads=1)
    for document, ids in zip(batch, encoded, strict=True):
        # Of a tokenizer that keeps every text none needs to be looked at; blanks alone are no loss.
        if (
            not tokenizer.lossless
            and (len(ids) or document.text.strip())
            and (back := tokenizer.decode(ids.tolist())) != document.text
        ):
            stats.changed += 1
            stats.changed_example = stats.changed_example or first_change(document.text, back)
        if not len(ids):  # no text, or only what the tokenizer drops
            stats.empty += 1
            continue
        stats.text_bytes += document.size
        lengths.append(len(begin) + len(ids) + len(end))
        parts += (begin, ids, end)
        if tokenizer.unk_id is not None:
            stats.unknown += int(np.count_nonzero(ids == tokenizer.unk_id))
    if parts:
        writer.add_documents(np.concatenate(parts), lengths)
    stats.documents += len(lengths)
    stats.tokens += sum(lengths)


def tokenize_shards(
    shards: dict[int, InputShard], tokenizing: TokenizeConfig, workers: int
) -> Generator[tuple[int, ShardStats] | None, None, None]:
    """Tokenize shards by `workers` processes and yield each one's number and counts as it is finished.

    Yields None when nothing was finished for half a second. A worker ends with its parent, even by SIGKILL.

    Raises DataError: as `tokenize_shard`, or a worker died. Shards that others have begun are lost.
    """
    if not shards:
        return
    start_server(__name__)
    tokenizer = _opened(tokenizing)
    with worker_pool(min(workers, len(shards)), "forkserver") as pool:
        # Two for each worker: one shard is brought to the disk while the next is tokenized.
        threads = ThreadPoolExecutor(2 * workers)

        def finish(shard: InputShard) -> ShardStats:
            folder = shard_prefix(shard, tokenizing, tokenizer).parent
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            with atomic_dir(folder) as draft:
                return pool.submit(_tokenize, shard, tokenizing, draft / PREFIX).result()

        try:
            numbers = {threads.submit(finish, shard): number for number, shard in shards.items()}
            pending = set(numbers)
            while pending:
                finished, pending = wait(pending, POLL_INTERVAL_S, FIRST_COMPLETED)
                for future in finished:
                    yield numbers[future], future.result()
                if not finished:
                    yield None
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, most likely because memory ran out: give fewer --workers; what "
                "is finished is kept, so run the same command again"
            ) from None
        except OSError as error:
            raise DataError(
                f"{tokenizing.folder} cannot be written ({error.strerror or error}): free some space or "
                "choose another --output-prefix; what is finished is kept, so run the same command again"
            ) from None
        finally:
            # After an error the answers of the others are not needed: do not wait for them.
            threads.shutdown(wait=False, cancel_futures=True)


def _tokenize(shard: InputShard, tokenizing: TokenizeConfig, prefix: Path) -> ShardStats:
    return tokenize_shard(shard, tokenizing, _opened(tokenizing), prefix)


@functools.cache
def _opened(tokenizing: TokenizeConfig) -> Tokenizer:
    return open_tokenizer(tokenizing.tokenizer_path, tokenizing.prepend_bos)

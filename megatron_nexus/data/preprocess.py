"""Preprocessing: text files become a tokenized corpus.

    find the input files -> cut them into shards -> tokenize those that no earlier run has finished
                                                 -> merge them as they are finished

The corpus does not depend on how it was made: documents stand in the order of the inputs, and workers, ranks,
shards and restarts change no byte. Shards are kept in `<prefix>.shards` until the corpus is complete.
"""

import heapq
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_nexus.base.communicator import Communicator, wait_for_message
from megatron_nexus.base.durable import DRAFT, dir_lock
from megatron_nexus.data.corpus_description import CorpusDescription, loss_lines
from megatron_nexus.data.documents import REPORTED, bad_record_lines, no_document, split_into_slices
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path, token_dtype
from megatron_nexus.data.input_files import InputFile, empty_file_lines, find_input_files
from megatron_nexus.data.shards import (
    PREFIX,
    InputShard,
    ShardStats,
    TokenizeConfig,
    finished_stats,
    make_shards,
    shard_prefix,
    tokenize_shards,
)
from megatron_nexus.data.tokenizer import Tokenizer, open_tokenizer
from megatron_nexus.errors import ConfigError, DataError, NexusError, os_errors_as, path_errors
from megatron_nexus.log import Progress, logger

SMALLEST_SHARD_BYTES, LARGEST_SHARD_BYTES = 1 << 21, 1 << 28
SHARDS_OF_LARGE_CORPORA = 1 << 14
"""Enough for every core of a large cluster, few enough for a parallel file system."""


@dataclass(frozen=True)
class PreprocessConfig:
    """What to make of what."""

    inputs: list[str]
    """Files, folders and globs."""
    output_prefix: Path
    tokenizing: TokenizeConfig
    overwrite: bool = False
    workers: int = 0
    """Processes of each rank; 0: one a core."""
    log_interval_s: float = 5.0


@dataclass(frozen=True)
class _Assignment:
    """Rank 0 to another, first of all: what it has to tokenize."""

    shards: dict[int, InputShard]


@dataclass(frozen=True)
class _Failure:
    """A rank to rank 0: it has failed. Rank 0 to all: stop."""

    message: str


@dataclass(frozen=True)
class _Done:
    """A rank to rank 0: its share is finished. Rank 0 to all: the corpus is."""


def preprocess(job: PreprocessConfig, comm: Communicator) -> CorpusDescription | None:
    """Write the corpus of `job`; to be called by all ranks of `comm`.

    Returns the corpus' description on rank 0, which also raises for all; other ranks return None.

    Raises ConfigError: inputs, output and options that cannot work, all problems at once; DataError: damaged
    inputs, malformed records under `strict`, no documents, a full disk. Finished shards stay for another run.
    """
    if comm.rank > 0:
        _run_worker(job, comm)
        return None
    others = range(1, comm.size)
    try:
        with path_errors():
            description = _run_coordinator(job, comm)
    except NexusError as error:
        for rank in others:
            comm.send(rank, _Failure(str(error)))
        raise
    for rank in others:
        comm.send(rank, _Done())
    return description


def _run_worker(job: PreprocessConfig, comm: Communicator) -> None:
    """Tokenize the shards that rank 0 assigns, and report each finished one to it."""
    assignment = wait_for_message(comm)
    if not isinstance(assignment, _Assignment):
        return
    try:
        with (
            path_errors(),
            closing(tokenize_shards(assignment.shards, job.tokenizing, job.workers or comm.cores)) as steps,
        ):
            for finished in steps:
                if finished is not None:
                    comm.send(0, finished)
                if any(isinstance(message, _Failure) for message in comm.received()):
                    return
        comm.send(0, _Done())
    except NexusError as error:
        comm.send(0, _Failure(f"rank {comm.rank}: {error}"))
    # Leaving earlier could make mpirun end rank 0 before it has said what happened.
    wait_for_message(comm)


def _run_coordinator(job: PreprocessConfig, comm: Communicator) -> CorpusDescription:
    """Share the work out, do a part of it, and merge."""
    tokenizer, files, shards = _plan(job)
    tokenizing = job.tokenizing
    dtype = token_dtype(tokenizer.vocab_size)
    began = time.monotonic()
    with _locked(tokenizing.folder):
        _remove(tokenizing.folder.glob(f"{DRAFT}*"))
        prefixes = [shard_prefix(shard, tokenizing, tokenizer) for shard in shards]
        counts = _finished(prefixes, tokenizing, dtype)
        missing = {number: shard for number, shard in enumerate(shards) if number not in counts}
        earlier = f", {len(counts):,} of them finished by an earlier run" if counts else ""
        logger.info(
            f"{len(files):,} files, {sum(file.size for file in files) / 1e6:,.1f} MB: {len(shards):,} shards"
            f"{earlier}; {comm.size} ranks, {job.workers or comm.cores} workers on this one"
        )
        what = f"{job.output_prefix} cannot be written"
        remedy = "free some space; all shards are kept, so run the same command again"
        with (
            os_errors_as(DataError, what, remedy),
            IndexedDatasetWriter(job.output_prefix, dtype) as corpus,
        ):
            merging = _merge(corpus, prefixes, counts)
            with closing(_tokenize(missing, counts, tokenizing, comm, job)) as steps:
                merged = sum(next(merging, 0) for _ in steps)
            ordered = [counts[number] for number in range(len(shards))]
            total, samples = ShardStats(), _samples(shards, ordered)
            for stats in ordered:
                total.add(stats)
            total.malformed = dict(Counter(total.malformed).most_common())
            if not total.documents:
                _remove(tokenizing.folder.glob("[!.]*"))
                raise no_document(total.empty, total.malformed, samples, empty_file_lines(files))
            description = _describe(job, tokenizer, files, total, samples)
            corpus.description = description.to_json()
            left = total.tokens - merged
            with Progress(f"Merging the rest into {job.output_prefix}", left, "M tokens") as progress:
                for tokens in merging:
                    progress.advance(tokens)
        _remove(tokenizing.folder.glob("[!.]*"))
    lost = loss_lines(description)
    for line in (*empty_file_lines(files), *bad_record_lines(total.malformed, samples), *lost):
        logger.warning("%s", line)
    logger.info(
        f"{job.output_prefix}: {total.documents:,} documents, {total.tokens:,} tokens, "
        f"{total.text_bytes / total.tokens:.2f} bytes per token, {total.empty:,} empty records left out; "
        f"{time.monotonic() - began:.1f} s"
    )
    return description


def _finished(prefixes: list[Path], tokenizing: TokenizeConfig, dtype: np.dtype) -> dict[int, ShardStats]:
    """Return the counts of the shards that an earlier run has finished, by number."""
    # One listing: asking for each would be slow, and an NFS client would remember that it was missing.
    present = {path.name for path in tokenizing.folder.iterdir()}
    return {
        number: count
        for number, prefix in enumerate(prefixes)
        if prefix.parent.name in present and (count := finished_stats(prefix, dtype.itemsize))
        # Under --strict the malformed record is the error: find its line again.
        if not (tokenizing.strict and count.malformed)
    }


def _merge(
    corpus: IndexedDatasetWriter, prefixes: list[Path], counts: dict[int, ShardStats]
) -> Iterator[int]:
    """Append shards in their order, one a step; yields its tokens, or 0 while the next one has no counts."""
    for number, prefix in enumerate(prefixes):
        while number not in counts:
            yield 0
        if counts[number].documents:
            corpus.append(prefix)
        yield counts[number].tokens


def _plan(job: PreprocessConfig) -> tuple[Tokenizer, list[InputFile], list[InputShard]]:
    """Return tokenizer, files and shards. Raises ConfigError with all that stands against the job."""
    problems: list[str] = []
    files: list[InputFile] = []
    shards: list[InputShard] = []
    try:
        files = find_input_files(job.inputs, job.tokenizing.strict)
        shard_bytes = _shard_bytes(sum(file.size for file in files))
        shards = make_shards(split_into_slices(files, job.tokenizing.reading, shard_bytes), shard_bytes)
    except ConfigError as error:
        problems += error.problems
    if job.output_prefix.suffix in (".bin", ".idx"):
        bare = job.output_prefix.with_suffix("")
        problems.append(f"--output-prefix {job.output_prefix}: give it without the ending: {bare}")
    existing = [path for path in (bin_path(job.output_prefix), idx_path(job.output_prefix)) if path.exists()]
    if existing and not job.overwrite:
        names = " and ".join(map(str, existing))
        problems.append(
            f"--output-prefix {job.output_prefix}: {names} exist: add --overwrite or choose another prefix"
        )
    try:
        tokenizer = open_tokenizer(job.tokenizing.tokenizer_path, job.tokenizing.prepend_bos)
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return tokenizer, files, shards


def _shard_bytes(total_bytes: int) -> int:
    """Return a power of two, so that a few more inputs do not cut all files differently."""
    wanted = 1 << max(0, total_bytes // SHARDS_OF_LARGE_CORPORA).bit_length()
    return min(max(wanted, SMALLEST_SHARD_BYTES), LARGEST_SHARD_BYTES)


def work_folder(output_prefix: Path) -> Path:
    """Return where the shards of a corpus are kept until it is complete."""
    return output_prefix.with_name(f"{output_prefix.name}.shards")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the work folder; the system lets go of it when this process ends.

    Without a finished shard in it, nothing of it stays.
    """
    with ExitStack() as held:
        try:
            held.enter_context(dir_lock(folder))
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing {folder}: wait for it, or choose another --output-prefix"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be written ({error.strerror}): choose an --output-prefix in another folder"
            ) from None
        try:
            yield
        finally:
            if not any(folder.glob(f"[!.]*/{PREFIX}.idx")):
                _remove(folder.glob(f"{DRAFT}*"))
    with suppress(OSError):  # other ranks may still be writing; what is not empty stays
        folder.rmdir()


def _remove(shards: Iterable[Path]) -> None:
    for path in shards:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:  # of a version that kept shards as files
            path.unlink(missing_ok=True)


def _tokenize(
    shards: dict[int, InputShard],
    counts: dict[int, ShardStats],
    tokenizing: TokenizeConfig,
    comm: Communicator,
    job: PreprocessConfig,
) -> Generator[None, None, None]:
    """Tokenize shards by all ranks and put the counts of each into `counts`; yields now and then."""
    shares = _shared_out(shards, comm.size)
    for rank in range(1, comm.size):
        comm.send(rank, _Assignment(shares[rank]))
    working = comm.size - 1
    total = sum(shard.size for shard in shards.values())

    with (
        Progress("Tokenizing", total, "MB", job.log_interval_s) as progress,
        closing(tokenize_shards(shares[0], tokenizing, job.workers or comm.cores)) as steps,
    ):

        def take(message: object) -> None:
            nonlocal working
            if isinstance(message, _Failure):
                raise DataError(message.message)
            if isinstance(message, _Done):
                working -= 1
                return
            assert isinstance(message, tuple), message
            number, counted = message
            counts[number] = counted
            progress.advance(shards[number].size)

        for finished in steps:
            if finished is not None:
                take(finished)
            for message in comm.received():
                take(message)
            yield
        while working:
            take(wait_for_message(comm))
            yield


def _shared_out(shards: dict[int, InputShard], ranks: int) -> list[dict[int, InputShard]]:
    """Return the shards of each rank, about equal in size: the largest first, each to the least loaded."""
    shares: list[dict[int, InputShard]] = [{} for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for number, shard in sorted(shards.items(), key=lambda item: -item[1].size):
        load, rank = loads[0]
        shares[rank][number] = shard
        heapq.heapreplace(loads, (load + shard.size, rank))
    return shares


def _samples(shards: list[InputShard], counts: list[ShardStats]) -> list[str]:
    pairs = zip(shards, counts, strict=True)
    records = (record for shard, count in pairs for record in count.sampled(shard))
    return [record.describe() for record in islice(records, REPORTED)]


def _describe(
    job: PreprocessConfig, tokenizer: Tokenizer, files: list[InputFile], total: ShardStats, samples: list[str]
) -> CorpusDescription:
    return CorpusDescription(
        tokenizer=tokenizer.model_path.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        append_eod=job.tokenizing.append_eod,
        json_key=job.tokenizing.reading.json_key,
        txt_documents=job.tokenizing.reading.txt_documents,
        input_files=len(files),
        input_bytes=sum(file.size for file in files),
        documents=total.documents,
        tokens=total.tokens,
        text_bytes=total.text_bytes,
        empty_documents=total.empty,
        empty_files=sum(not file.size for file in files),
        malformed=total.malformed,
        malformed_samples=samples,
        prepend_bos=bool(tokenizer.document_prefix),
        bos_id=tokenizer.bos_id,
        unknown_share=total.unknown / total.tokens,
        lossless=total.changed == 0,
        changed_documents=total.changed,
        changed_example=total.changed_example,
    )

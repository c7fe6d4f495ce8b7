"""A tokenized corpus on disk: the `.bin` / `.idx` pair of Megatron-LM, byte for byte.

    prefix.bin   the token ids of all sequences, one after the other, nothing in between
    prefix.json  what our writer knows beyond Megatron-LM's files, if anything (`corpus_description.py`)
    prefix.idx   magic "MMIDIDX\\0\\0" | version 1 u64 | dtype code u8 | sequences S u64 | boundaries D+1 u64
                 | lengths i32[S], in tokens | pointers i64[S], in bytes | boundaries i64[D+1], in sequences

All numbers are little-endian. A document is the sequences between two neighbouring boundaries; our writer
makes every document one sequence. Source of the layout: Megatron-LM, `core/datasets/indexed_dataset.py`.
"""

import hashlib
import mmap
import os
import shutil
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.durable import atomic_files
from megatron_nexus.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(kind).newbyteorder("<")
    for code, kind in enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

LARGEST_UINT16_VOCABULARY = 65_500
INDEX_BLOCK = 1 << 20
"""Documents whose pointers are computed at a time."""
COPY_BYTES = 1 << 20
FINGERPRINT_BLOCK = 512


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type Megatron-LM stores ids below `vocab_size` in: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < LARGEST_UINT16_VOCABULARY else np.int32)


def bin_path(prefix: Path) -> Path:
    """Return the file of token ids. (`Path.with_suffix` would eat the dot of a prefix such as `wiki-1.5`.)"""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the file of lengths, pointers and document boundaries."""
    return prefix.with_name(f"{prefix.name}.idx")


def json_path(prefix: Path) -> Path:
    """Return the file that describes the corpus; foreign corpora have none."""
    return prefix.with_name(f"{prefix.name}.json")


def index_bytes(sequences: int, boundaries: int) -> int:
    """Return the size of an `.idx` file."""
    return HEADER.size + 12 * sequences + 8 * boundaries


class IndexedDataset:
    """A memory-mapped `.bin` / `.idx` pair, opened for reading.

    Opening reads the header and a few numbers only, however large the corpus is.

    Raises DataError: a file is missing, empty, truncated or foreign, or the two files do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        bin_file, idx_file = bin_path(prefix), idx_path(prefix)
        for file in (idx_file, bin_file):
            if not file.is_file():
                raise DataError(
                    f"{file} does not exist: give the common prefix of a .bin and an .idx file, "
                    "without the ending"
                )
        bin_bytes, idx_bytes = bin_file.stat().st_size, idx_file.stat().st_size
        if idx_bytes < HEADER.size:
            raise DataError(
                f"{idx_file} has {idx_bytes} bytes, its header alone takes {HEADER.size}: "
                "it is empty or truncated; write it again"
            )
        with idx_file.open("rb") as file_handle:
            magic, version, code, sequences, boundaries = HEADER.unpack(file_handle.read(HEADER.size))
        if magic != MAGIC:
            raise DataError(
                f"{idx_file} begins with {magic!r}, not {MAGIC!r}: it is not a Megatron-LM index; "
                "tokenize the corpus again"
            )
        if version != VERSION:
            raise DataError(
                f"{idx_file} has format version {version}, only {VERSION} is known: write it again"
            )
        if code not in DTYPES or DTYPES[code].kind == "f":
            raise DataError(
                f"{idx_file} has the type code {code}, which is not an integer type: "
                "it does not hold token ids; tokenize the corpus again"
            )
        self.dtype: np.dtype = DTYPES[code]
        expected_bytes = index_bytes(sequences, boundaries)
        if idx_bytes != expected_bytes:
            raise DataError(
                f"{idx_file} has {idx_bytes} bytes, its header promises {expected_bytes}: it is truncated or "
                "of a multimodal dataset; write it again"
            )
        if sequences == 0 or boundaries < 2:
            raise DataError(f"{idx_file} lists no documents: tokenize a corpus that is not empty")

        index = _map(idx_file)
        after_lengths = HEADER.size + 4 * sequences
        after_pointers = after_lengths + 8 * sequences
        self._lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", sequences, after_lengths)
        self._boundaries = np.frombuffer(index, "<i8", boundaries, after_pointers)
        if self._pointers[0] != 0 or self._boundaries[0] != 0 or self._boundaries[-1] != sequences:
            raise DataError(f"{idx_file} contradicts itself: it is damaged; write it again")
        indexed_bytes = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
        if bin_bytes != indexed_bytes or bin_bytes == 0:
            raise DataError(
                f"{bin_file} has {bin_bytes} bytes, {idx_file.name} describes {indexed_bytes}: the file is "
                "empty, truncated or of another corpus; copy or write both files again"
            )
        self._bin = _map(bin_file)
        self._tokens: np.ndarray = np.frombuffer(self._bin, self.dtype)

    @property
    def document_count(self) -> int:
        """Number of documents, D."""
        return len(self._boundaries) - 1

    @property
    def token_count(self) -> int:
        """Number of tokens of all documents together."""
        return len(self._tokens)

    @property
    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per document, [D], 8 bytes each; computed each time, so keep it."""
        lengths = np.empty(self.document_count, dtype=np.int64)
        for first in range(0, self.document_count, INDEX_BLOCK):
            sequences = self._boundaries[first : first + INDEX_BLOCK + 1]
            held = sequences < len(self._pointers)
            starts = np.full(len(sequences), self._tokens.nbytes, dtype=np.int64)
            starts[held] = self._pointers[sequences[held]]
            lengths[first : first + INDEX_BLOCK] = np.diff(starts) // self.dtype.itemsize
        return lengths

    def document_start(self, document: int) -> int:
        """Return where a document begins in the token stream; for document D, where the stream ends."""
        sequence = int(self._boundaries[document])
        if sequence == len(self._pointers):
            return self.token_count
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the tokens in [start, stop) of the stream at which documents begin, ascending; O(log D)."""
        found = documents_between(start, stop, self.document_count, self.document_start)
        sequences = self._boundaries[found.start : found.stop]
        return self._pointers[sequences] // self.dtype.itemsize

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the stream of all documents, a view in the stored type."""
        assert 0 <= start <= stop <= self.token_count, (start, stop, self.token_count)
        # One request of just these pages to the disk.
        first = start * self.dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        self._bin.madvise(mmap.MADV_WILLNEED, first, stop * self.dtype.itemsize - first)
        return self._tokens[start:stop]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the sizes and 64 blocks spread over tokens and boundaries: cheap for any corpus."""
        digest = hashlib.sha256(f"{self.dtype.str} {self.token_count} {self.document_count}".encode())
        for numbers in (self._tokens, self._pointers):
            for first in np.linspace(0, max(0, len(numbers) - FINGERPRINT_BLOCK), 64).astype(np.int64):
                digest.update(numbers[first : first + FINGERPRINT_BLOCK].tobytes())
        return digest.hexdigest()

    def check_vocabulary(self, ids: npt.NDArray[np.integer], vocab_size: int) -> None:
        """Refuse ids of this corpus that a vocabulary does not have.

        Raises DataError: one of `ids` (any shape) is negative or not below `vocab_size`.
        """
        if ids.size == 0 or 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            return
        foreign = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise DataError(
            f"{bin_path(self.prefix)} holds the token id {foreign}, the vocabulary has {vocab_size} ids "
            "from 0: use the tokenizer that the corpus was written with, or tokenize the corpus again"
        )


def documents_between(start: int, stop: int, count: int, start_of: Callable[[int], int]) -> range:
    """Return which of `count` documents begin in the tokens [start, stop), looking at few of them."""
    first = bisect_left(range(count), start, key=start_of)
    reach = 1
    while first + reach < count and start_of(first + reach) < stop:
        reach *= 2
    beyond = min(first + reach, count)
    return range(first, bisect_left(range(count), stop, lo=first, hi=beyond, key=start_of))


class IndexedDatasetWriter:
    """Writes a `.bin` / `.idx` pair; use it as a context manager.

    The pair appears only when the block ends without an error. With `in_draft` the folder is a draft that the
    caller makes durable, and the files are written as they are.

    Raises DataError: a document holds an id that `dtype` cannot; OSError, whose remedy the caller knows.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike, in_draft: bool = False) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.description = ""
        """Text of the `.json` next to the pair, set within the block; empty: none, an old one is removed."""
        assert self.dtype in CODES and self.dtype.kind != "f", f"{dtype} is not a type of token ids"
        self._lengths = array("i")
        self._in_draft = in_draft

    def add_document(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append one document; the end-of-document token is the caller's to add."""
        self.add_documents(np.asarray(ids, dtype=np.int64), [len(ids)])

    def add_documents(self, ids: npt.NDArray[np.integer], lengths: Sequence[int]) -> None:
        """Append documents that stand one behind the other in `ids`, [sum of lengths]."""
        limits = np.iinfo(self.dtype)
        if ids.size and not limits.min <= int(ids.min()) <= int(ids.max()) <= limits.max:
            wrong = np.flatnonzero((ids < limits.min) | (ids > limits.max))[0]
            document = len(self._lengths) + int(np.searchsorted(np.cumsum(lengths), wrong, side="right"))
            raise DataError(
                f"{self.prefix}: document {document} has the id {ids[wrong]}, {self.dtype.name} holds "
                f"{limits.min} to {limits.max}: use the type that fits the vocabulary"
            )
        self._bin.write(ids.astype(self.dtype).data)
        self._lengths.extend(lengths)

    def append(self, prefix: Path) -> None:
        """Append all documents of a pair that this writer's kind wrote in the same type.

        Streams: holds 4 bytes a document in memory, and no tokens.
        """
        part = IndexedDataset(prefix)
        assert part.dtype == self.dtype, (part.dtype, self.dtype)
        start = self._bin.tell()
        with bin_path(prefix).open("rb") as tokens:
            shutil.copyfileobj(tokens, self._bin, COPY_BYTES)
        self._bin.flush()
        # The disk begins to write now: at the end there is little to wait for.
        os.posix_fadvise(self._bin.fileno(), start, 0, os.POSIX_FADV_DONTNEED)
        self._lengths.frombytes(part.document_lengths.astype(np.int32).tobytes())

    def __enter__(self) -> "IndexedDatasetWriter":
        paths = (bin_path(self.prefix), json_path(self.prefix), idx_path(self.prefix))
        with ExitStack() as stack:
            drafts = (
                {path: path for path in paths} if self._in_draft else stack.enter_context(atomic_files(paths))
            )
            bin_draft, self._json_draft, self._idx_draft = drafts.values()
            self._bin = stack.enter_context(bin_draft.open("wb"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> None:
        if kind is None:
            self._open.callback(self._write_index)
        self._open.__exit__(kind, *raised)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        blocks = [lengths[first : first + INDEX_BLOCK] for first in range(0, len(lengths), INDEX_BLOCK)]
        with self._idx_draft.open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(lengths) + 1))
            index.write(lengths.astype("<i4", copy=False).data)
            pointer = 0
            for block in blocks:
                ends = pointer + np.cumsum(block, dtype="<i8") * self.dtype.itemsize
                index.write((ends - block.astype("<i8") * self.dtype.itemsize).tobytes())
                pointer = int(ends[-1])
            for first in range(0, len(lengths) + 1, INDEX_BLOCK):
                stop = min(first + INDEX_BLOCK, len(lengths) + 1)
                index.write(np.arange(first, stop, dtype="<i8").tobytes())
        if self.description:
            self._json_draft.write_text(self.description)


def _map(file: Path) -> mmap.mmap:
    """Map a file into memory, without read-ahead: what is read lies anywhere."""
    with file.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped

"""What it costs to open a corpus of a billion documents, and to read samples of it.

    python benchmarks/open_index.py FOLDER [--documents 1000000000]

Writes a synthetic pair to FOLDER and removes it: documents of 100 tokens, 20 GB of index and 200 GB of
tokens in sparse files, of which only the places that are touched take room on the disk. Those places hold
what a full index would hold there. Prints JSON.
"""

import argparse
import json
import os
import struct
import time
from pathlib import Path

import numpy as np

from megatron_nexus.data.indexed_dataset import (
    CODES,
    HEADER,
    MAGIC,
    VERSION,
    IndexedDataset,
    bin_path,
    documents_between,
    idx_path,
)
from megatron_nexus.data.samples import TokenWindows, split_documents

DOCUMENT_TOKENS = 100
SEQ_LENGTH = 4096
SAMPLES = 100
SPLIT = "969,30,1"
DTYPE = np.dtype("<u2")


def touched(documents: int) -> set[int]:
    """The documents whose places the split and the samples' document boundaries look up."""
    cuts = [0, round(0.969 * documents), round(0.999 * documents), documents - 1]
    seen: set[int] = set(cuts)

    def start(document: int) -> int:
        seen.add(document)
        return document * DOCUMENT_TOKENS

    for first in sample_starts(documents):
        seen.update(documents_between(first, first + SEQ_LENGTH, documents, start))
    return seen


def sample_starts(documents: int) -> list[int]:
    windows = documents * DOCUMENT_TOKENS // SEQ_LENGTH
    return [windows * i // SAMPLES * SEQ_LENGTH for i in range(SAMPLES)]


def write_sparse(prefix: Path, documents: int) -> None:
    """A pair of `documents` documents whose index is written where it will be touched."""
    with bin_path(prefix).open("wb") as tokens:
        tokens.truncate(documents * DOCUMENT_TOKENS * DTYPE.itemsize)
    lengths = HEADER.size
    pointers = lengths + 4 * documents
    boundaries = pointers + 8 * documents
    with idx_path(prefix).open("wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, CODES[DTYPE], documents, documents + 1))
        index.truncate(boundaries + 8 * (documents + 1))

        def put(offset: int, layout: str, value: int) -> None:
            index.seek(offset)
            index.write(struct.pack(layout, value))

        for document in touched(documents):
            put(lengths + 4 * document, "<i", DOCUMENT_TOKENS)
            put(pointers + 8 * document, "<q", document * DOCUMENT_TOKENS * DTYPE.itemsize)
            put(boundaries + 8 * document, "<q", document)
        put(boundaries + 8 * documents, "<q", documents)


def resident_bytes() -> int:
    """Memory of this process, mapped pages of files that it has touched included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget(path: Path) -> None:
    """Drop the file from the system's cache, so that opening it reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def measure(prefix: Path) -> dict[str, float]:
    """Seconds and bytes of opening the pair, and of one sample with its document boundaries."""
    before_bytes, began = resident_bytes(), time.perf_counter()
    dataset = IndexedDataset(prefix)
    splits = split_documents(dataset, SPLIT)
    windows = TokenWindows(dataset, splits.train, SEQ_LENGTH, seed=1, vocab_size=32_000)
    windows.sample(0)
    open_s, open_bytes = time.perf_counter() - began, resident_bytes() - before_bytes
    began = time.perf_counter()
    for first in sample_starts(dataset.document_count):
        starts = dataset.document_starts(first, first + SEQ_LENGTH)
        expected = np.arange(-(-first // DOCUMENT_TOKENS), -(-(first + SEQ_LENGTH) // DOCUMENT_TOKENS))
        assert np.array_equal(starts, expected * DOCUMENT_TOKENS), "a place that was not written was touched"
    boundaries_s = (time.perf_counter() - began) / SAMPLES
    began = time.perf_counter()
    for k in range(SAMPLES):
        windows.sample(k)
    return {
        "documents": dataset.document_count,
        "tokens": dataset.token_count,
        "open_s": round(open_s, 4),
        "open_bytes": open_bytes,
        "document_boundaries_s_per_sample": round(boundaries_s, 6),
        "sample_s": round((time.perf_counter() - began) / SAMPLES, 6),
        "bytes_after_samples": resident_bytes() - before_bytes,
        "sparse_bytes_on_disk": sum(path(prefix).stat().st_blocks * 512 for path in (bin_path, idx_path)),
    }


def main() -> None:
    """Write, measure, remove."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=1_000_000_000)
    words = parser.parse_args()
    prefix: Path = words.folder / "billion"
    try:
        write_sparse(prefix, words.documents)
        for path in (bin_path(prefix), idx_path(prefix)):
            forget(path)
        print(json.dumps(measure(prefix), indent=1))
    finally:
        for path in (bin_path(prefix), idx_path(prefix)):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

"""The `.bin` / `.idx` pair: its bytes, its round trip, and what damaged files and dead writers leave."""

import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, token_dtype
from megatron_nexus.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 65_499]]


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def files(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


@pytest.mark.parametrize(
    ("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i"), (np.int64, 5, "q")]
)
def test_the_bytes_are_those_of_megatron(tmp_path: Path, dtype: type, code: int, letter: str) -> None:
    binary, index = files(write(tmp_path / "corpus", DOCUMENTS, dtype))
    assert binary.read_bytes() == struct.pack(f"<7{letter}", 5, 6, 7, 8, 9, 10, 65_499)
    size = struct.calcsize(letter)
    assert index.read_bytes() == b"".join(
        [
            b"MMIDIDX\x00\x00",
            struct.pack("<Q", 1),
            struct.pack("<B", code),
            struct.pack("<Q", 4),
            struct.pack("<Q", 5),
            struct.pack("<4i", 3, 1, 0, 3),
            struct.pack("<4q", 0, 3 * size, 4 * size, 4 * size),
            struct.pack("<5q", 0, 1, 2, 3, 4),
        ]
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "corpus-1.5", DOCUMENTS))
    assert dataset.dtype == np.uint16
    assert (dataset.document_count, dataset.token_count) == (4, 7)
    assert dataset.document_lengths.tolist() == [3, 1, 0, 3]
    assert [dataset.document_start(d) for d in range(5)] == [0, 3, 4, 4, 7]
    assert dataset.tokens(2, 6).tolist() == [7, 8, 9, 10]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron's sentence-split corpora: two documents, of two sequences and of one."""
    prefix = write(tmp_path / "corpus", [[1, 2], [3], [4, 5, 6]])
    index = files(prefix)[1]
    raw = index.read_bytes()
    header = raw[:18] + struct.pack("<QQ", 3, 3)
    index.write_bytes(header + raw[34 : 34 + 36] + struct.pack("<3q", 0, 2, 3))
    dataset = IndexedDataset(prefix)
    assert dataset.document_lengths.tolist() == [3, 3]
    assert dataset.document_start(1) == 3
    assert dataset.document_starts(0, 6).tolist() == [0, 3]
    assert dataset.document_starts(1, 3).tolist() == []


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    prints = {
        name: IndexedDataset(write(tmp_path / name, documents, dtype)).fingerprint
        for name, documents, dtype in [
            ("one", DOCUMENTS, np.uint16),
            ("same", DOCUMENTS, np.uint16),
            ("wider", DOCUMENTS, np.int32),
            ("other", [[5, 6, 7], [9], [], [9, 10, 65_499]], np.uint16),
            ("cut", [[5, 6], [7, 8], [], [9, 10, 65_499]], np.uint16),
        ]
    }
    assert prints["one"] == prints["same"]
    assert len(set(prints.values())) == 4


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(4096, np.uint16), (65_499, np.uint16), (65_500, np.int32)]
)
def test_the_type_follows_the_vocabulary(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype


@pytest.mark.parametrize(
    ("which", "damage", "message"),
    [
        (0, None, "does not exist"),
        (1, None, "does not exist"),
        (0, lambda raw: raw[:-2], "truncated"),
        (0, lambda raw: raw + b"\0\0", "another corpus"),
        (0, lambda raw: b"", "empty"),
        (1, lambda raw: b"", "empty"),
        (1, lambda raw: raw[:-8], "truncated"),
        (1, lambda raw: raw[:20], "truncated"),
        (1, lambda raw: b"PK" + raw[2:], "not a Megatron-LM index"),
        (1, lambda raw: raw[:9] + b"\2" + raw[10:], "version 2"),
        (1, lambda raw: raw[:17] + b"\7" + raw[18:], "type code 7"),
        (1, lambda raw: raw[:-8] + struct.pack("<q", 9), "contradicts itself"),
        (1, lambda raw: raw[:18] + struct.pack("<QQ", 0, 0), "lists no documents"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, which: int, damage, message: str) -> None:
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    file = files(prefix)[which]
    raw = file.read_bytes()
    file.unlink()
    if damage is not None:
        file.write_bytes(damage(raw))
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert file.name in str(caught.value)


def test_the_index_is_written_without_a_copy_of_its_lengths(tmp_path: Path) -> None:
    documents = 1 << 23
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer._lengths.frombytes(bytes(4 * documents))
        tracemalloc.start()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Blocks of a million documents are computed at a time: 8 bytes for each of them, in a few arrays.
    assert peak < 4 * documents


def test_an_id_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="65536"), IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 65_536])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_pair(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    before = [file.read_bytes() for file in files(prefix)]
    with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document([1])
        raise KeyboardInterrupt
    assert [file.read_bytes() for file in files(prefix)] == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter\n"
        "with IndexedDatasetWriter(Path(sys.argv[1]), 'uint16') as writer:\n"
        "    writer.add_document(range(60000))\n"
        "    sys.stdout.write('written\\n'); sys.stdout.flush()\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "corpus"], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    with pytest.raises(DataError, match="does not exist"):
        IndexedDataset(tmp_path / "corpus")

"""Headers of others' files: what is damaged is refused by one error that names the file."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_nexus.errors import CheckpointError
from megatron_nexus.interchange.gguf_file import open_gguf
from megatron_nexus.interchange.safetensors_folder import SafetensorsWeights


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Two tensors of float32: a of 6 elements in the bytes [0, 24), b of 2 in [24, 32)."""
    path = tmp_path / "model.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_a_damaged_safetensors_file_is_one_error_that_names_it(sound: Path) -> None:
    contents = sound.read_bytes()
    end = 8 + int.from_bytes(contents[:8], "little")
    weights = SafetensorsWeights([sound])
    assert weights.shapes == {"a": (2, 3), "b": (2,)}
    assert (weights.read_rows("a", 1, 2) == [[3, 4, 5]]).all()
    header = json.loads(contents[8:end])
    header["a"]["dtype"] = "I32"
    changes = {
        "a type that is not imported": json.dumps(header).encode(),
        "brackets": b"[" * 100_000,
        "no UTF-8": b"{\xff}",
        "nothing": b"",
    }
    damaged = {
        what: len(text).to_bytes(8, "little") + text + contents[end:] for what, text in changes.items()
    }
    damaged |= {f"{size} bytes": contents[:size] for size in range(0, len(contents), 9)}
    damaged |= {"too long a header": (2**63).to_bytes(8, "little") + contents[8:]}
    for what, found in damaged.items():
        sound.write_bytes(found)
        with pytest.raises(CheckpointError) as error:
            SafetensorsWeights([sound])
        assert str(sound) in str(error.value) and ": " in str(error.value), what
    sound.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file: copy"):
        SafetensorsWeights([sound])


def write_gguf(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(7)
    writer.add_token_list(["first", "second"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_tensor("one.weight", np.ones((2, 32), np.float32))
    writer.add_tensor("two.weight", np.ones(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def at(contents: bytes, text: bytes, distance: int) -> int:
    """The place that lies `distance` bytes from the end of a text in a file."""
    return contents.index(text) + len(text) + distance


HUGE = struct.pack("<Q", 2**60)
GGUF_CHANGES: dict[str, tuple[Callable[[bytes], int], bytes]] = {
    "version": (lambda _: 4, struct.pack("<I", 9)),
    "tensors": (lambda _: 8, HUGE),
    "fields": (lambda _: 16, HUGE),
    "length of a name": (lambda _: 24, HUGE),
    "length of a text": (lambda c: at(c, b"tokenizer.ggml.tokens", 16), HUGE),
    "length of texts": (lambda c: at(c, b"tokenizer.ggml.tokens", 8), HUGE),
    "length of numbers": (lambda c: at(c, b"some.numbers", 8), HUGE),
    "type of a field": (lambda c: at(c, b"some.numbers", 0), struct.pack("<I", 99)),
    "array of arrays": (lambda c: at(c, b"some.numbers", 4), struct.pack("<I", 9)),
    "axes": (lambda c: at(c, b"one.weight", 0), struct.pack("<I", 2**31)),
    "an axis": (lambda c: at(c, b"one.weight", 4), HUGE),
    "type of a tensor": (lambda c: at(c, b"one.weight", 20), struct.pack("<I", 99)),
    "blocks": (lambda c: at(c, b"two.weight", 12), struct.pack("<I", 2)),
    "overlap": (lambda c: at(c, b"two.weight", 16), struct.pack("<Q", 32)),
    "gap": (lambda c: at(c, b"two.weight", 16), struct.pack("<Q", 288)),
    "negative": (lambda c: at(c, b"two.weight", 16), struct.pack("<q", -32)),
    "beyond the end": (lambda c: at(c, b"two.weight", 16), HUGE),
    "twice": (lambda c: c.index(b"two.weight"), b"one.weight"),
}


@pytest.mark.parametrize("change", GGUF_CHANGES)
def test_a_gguf_header_that_is_not_true_is_refused_at_once(change: str, tmp_path: Path) -> None:
    contents = bytearray(write_gguf(tmp_path / "model.gguf"))
    find, value = GGUF_CHANGES[change]
    place = find(bytes(contents))
    contents[place : place + len(value)] = value
    (tmp_path / "model.gguf").write_bytes(contents)
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_gguf(tmp_path / "model.gguf")


def test_a_gguf_file_that_ends_early_is_refused_and_a_whole_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    contents = write_gguf(path)
    # It is read up to what a model needs and this one does not say.
    with pytest.raises(CheckpointError, match="does not say llama"):
        open_gguf(path)
    padding = -(5 * 4) % 32
    for size in range(0, len(contents) - padding, 7):
        path.write_bytes(contents[:size])
        with pytest.raises(CheckpointError, match="is not a GGUF file"):
            open_gguf(path)

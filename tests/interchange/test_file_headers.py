"""Headers of others' files: nothing is read by a header that the format's own library refuses."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_nexus.errors import CheckpointError
from megatron_nexus.interchange.gguf_file import open_gguf
from megatron_nexus.interchange.safetensors_header import read_header

Header = dict[str, dict[str, object]]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Two tensors of float32: a of 6 elements in the bytes [0, 24), b of 2 in [24, 32)."""
    path = tmp_path / "model.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def rewrite(path: Path, header: str | bytes, length: int | None = None) -> None:
    """Put another header before the data of a file."""
    contents = path.read_bytes()
    text = header.encode() if isinstance(header, str) else header
    old = int.from_bytes(contents[:8], "little")
    path.write_bytes(
        (len(text) if length is None else length).to_bytes(8, "little") + text + contents[8 + old :]
    )


def library_refuses(path: Path) -> bool:
    try:
        with safe_open(path, "np"):
            return False
    except (SafetensorError, OSError):
        return True


def offsets(a: list[object], b: list[object]) -> Callable[[Header], None]:
    return lambda header: (header["a"].update(data_offsets=a), header["b"].update(data_offsets=b))


CHANGES: dict[str, Callable[[Header], None]] = {
    "moved by -4": offsets([-4, 20], [20, 28]),
    "moved by 4": offsets([4, 28], [28, 36]),
    "overlap": offsets([0, 24], [20, 28]),
    "gap": offsets([0, 24], [28, 36]),
    "beyond the end": offsets([0, 24], [2**40, 2**40 + 8]),
    "backwards": offsets([24, 0], [24, 32]),
    "not whole": offsets([0.0, 24.0], [24, 32]),
    "texts": offsets(["0", "24"], [24, 32]),
    "three": offsets([0, 12, 24], [24, 32]),
    "size": lambda header: header["a"].update(shape=[2, 4]),
    "negative size": lambda header: header["a"].update(shape=[-2, -3]),
    "truth": lambda header: header["b"].update(shape=[True, 2]),
    "no shape": lambda header: header["a"].pop("shape"),
    "type": lambda header: header["a"].update(dtype="F31"),
    "left out": lambda header: header.pop("b"),
    "not an object": lambda header: header.update(b=[]),
    "metadata": lambda header: header.update(__metadata__={"format": 1}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_the_library_refuses_is_refused(change: str, sound: Path) -> None:
    assert read_header(sound)["b"].shape == (2,) and not library_refuses(sound)
    contents = sound.read_bytes()
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    CHANGES[change](header)
    rewrite(sound, json.dumps(header))
    assert library_refuses(sound)
    with pytest.raises(CheckpointError, match=r"is not a safetensors file|nothing is imported"):
        read_header(sound)


B = '"b": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}'
A = '"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}'


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (f"{{{A}, {B}, {B}}}", None),
        (f"{{{A}, {B}}}", 2**63),
        (f"{{{A}, {B}}}", 100_000_001),
        (f"{{{A}, {B}}}", 0),
        (f" {{{A}, {B}}}", None),
        (f"{{{A}, {B.replace('2]', 'NaN]', 1)}}}", None),
        ("[" * 100_000, None),
        ('{"a": ' * 10_000, None),
        (b"{\xff}", None),
    ],
    ids=["twice", "2^63", "too long", "empty", "blank", "nan", "deep list", "deep object", "no utf-8"],
)
def test_a_text_that_is_no_header_is_refused(header: str | bytes, length: int | None, sound: Path) -> None:
    rewrite(sound, header, length)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_header(sound)


def test_no_change_of_a_byte_lets_in_what_the_library_refuses(sound: Path) -> None:
    contents = sound.read_bytes()
    end = 8 + int.from_bytes(contents[:8], "little")
    random = np.random.default_rng(0)
    refused = 0
    for place in [*range(end), *random.integers(0, end, 200)]:
        changed = bytearray(contents)
        changed[place] ^= 1 << int(random.integers(7))
        sound.write_bytes(changed)
        if library_refuses(sound):
            refused += 1
            with pytest.raises(CheckpointError):
                read_header(sound)
    assert refused > 100
    for size in range(0, len(contents), 3):
        sound.write_bytes(contents[:size])
        with pytest.raises(CheckpointError):
            read_header(sound)


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

"""What a SentencePiece model file says: its pieces, and what it does to a text before it looks for them.

The file is a protocol buffer (sentencepiece_model.proto), of which the few fields that matter are read here:
one process cannot load two copies of its generated classes, and transformers brings one of its own.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from megatron_nexus.base.durable import naming_errors
from megatron_nexus.errors import DataError

FIXED_BYTES = {1: 8, 5: 4}
"""Bytes of a value by wire type; 0 is a number of variable length, 2 a value with a length before it."""


class Kind(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """How a text is cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """A token: its text, where a blank stands as U+2581, its score, its kind."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces by id, and the settings."""

    pieces: tuple[Piece, ...]
    model_type: ModelType
    byte_fallback: bool
    blanks_end_words: bool
    character_map: bytes
    """Compiled replacements of characters, such as those of NFKC; empty: none."""
    adds_dummy_prefix: bool
    removes_extra_blanks: bool
    escapes_blanks: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a model file. Raises DataError where it is none, OSError."""
    try:
        with naming_errors(path):
            contents = path.read_bytes()
        fields = list(_fields(contents))
        pieces = tuple(_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes))
        if not pieces:
            raise ValueError("it has no pieces")
        trainer, normalizer = (
            dict(_fields(b"".join(v for n, v in fields if n == number and isinstance(v, bytes))))
            for number in (2, 3)
        )
        character_map = normalizer.get(2, b"")
        return SentencePieceModel(
            pieces,
            ModelType(_number(trainer, 3, ModelType.UNIGRAM)),
            byte_fallback=bool(_number(trainer, 35, 0)),
            blanks_end_words=bool(_number(trainer, 24, 0)),
            character_map=character_map if isinstance(character_map, bytes) else b"",
            adds_dummy_prefix=bool(_number(normalizer, 3, 1)),
            removes_extra_blanks=bool(_number(normalizer, 4, 1)),
            escapes_blanks=bool(_number(normalizer, 5, 1)),
        )
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise DataError(
            f"the tokenizer model {path} is not a SentencePiece model ({error}): copy or train it again"
        ) from error


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    text, score = fields[1], fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece without text")
    return Piece(text.decode(), struct.unpack("<f", score)[0], Kind(_number(fields, 3, Kind.NORMAL)))


def _number(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if isinstance(value, bytes):
        raise ValueError(f"field {number} is not a number")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message in order: number and value. Raises IndexError or ValueError."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, at = _varint(message, at)
        else:
            length = FIXED_BYTES[key & 7]
        if at + length > len(message):
            raise ValueError("it ends within a field")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a varint (seven bits a byte, lowest first) and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at

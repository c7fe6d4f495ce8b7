"""Sealed JSON: an object whose last entry is the CRC-32 of all bytes before it, so that any damage shows."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

MARK = b',\n "crc32": '


def seal(record: Mapping[str, object], indent: int | None = None) -> str:
    """The text of a JSON object, sealed; `record` has at least one entry."""
    head = json.dumps(record, indent=indent).removesuffix("}").rstrip()
    return f"{head}{MARK.decode()}{zlib.crc32(head.encode())}}}\n"


def unseal(contents: bytes) -> dict[str, Any]:
    """The object in a sealed text. Raises ValueError where a byte differs from what was sealed."""
    head, _, checksum = contents.rpartition(MARK)
    if checksum != b"%d}\n" % zlib.crc32(head):
        raise ValueError("its CRC-32 differs")
    found = json.loads(contents)
    assert isinstance(found, dict), "sealed as an object"
    return found

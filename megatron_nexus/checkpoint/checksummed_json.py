"""JSON objects whose last entry is the CRC-32 of all bytes before it, so that any damage is detected."""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from megatron_nexus.base.json_text import parse_json

MARK = b',\n "crc32": '
END = re.compile(re.escape(MARK) + rb"\d+}\n\Z")


def dumps_with_crc(record: Mapping[str, object], indent: int | None = None) -> str:
    """Return the text of a JSON object that ends with its CRC-32; `record` has at least one entry."""
    head = json.dumps(record, indent=indent).removesuffix("}").rstrip()
    return f"{head}{MARK.decode()}{zlib.crc32(head.encode())}}}\n"


def is_truncated(contents: bytes) -> bool:
    """Return whether the end of the text is missing, as after a crash or an interrupted copy."""
    return END.search(contents, max(0, len(contents) - 64)) is None


def loads_with_crc(contents: bytes) -> dict[str, Any]:
    """Return the object in a text with a CRC-32. Raises ValueError if a byte has changed."""
    head, _, checksum = contents.rpartition(MARK)
    if checksum != b"%d}\n" % zlib.crc32(head):
        raise ValueError("its CRC-32 differs")
    found = parse_json(contents)
    assert isinstance(found, dict), "sealed as an object"
    return found

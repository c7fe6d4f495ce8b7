"""Columns of parquet files that hold text: found by a key such as `doc.text`, read as bytes.

pyarrow is imported by whoever opens a file: here it is there.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
TEXT_TYPES = frozenset({*STRINGS, "null"})
"""By pyarrow's names; null is what a writer makes of a column without any value."""


def nested_keys(key: str) -> Iterator[tuple[str, str]]:
    """Yield the ways in which a key may lead through a field: that field's name, and the key within."""
    for place, character in enumerate(key):
        if character == ".":
            yield key[:place], key[place + 1 :]


def find_column(fields: "Sequence[pyarrow.Field]", key: str) -> "list[pyarrow.Field] | None":
    """Return the fields that lead to a column, whose own name may have dots; None where there is none."""
    by_name = {field.name: field for field in fields}
    if key in by_name:
        return [by_name[key]]
    for name, rest in nested_keys(key):
        within = find_column(_inner(by_name[name]), rest) if name in by_name else None
        if within is not None:
            return [by_name[name], *within]
    return None


def column_keys(fields: "Sequence[pyarrow.Field]", above: str = "") -> list[str]:
    """Return the keys of all columns."""
    found: list[str] = []
    for field in fields:
        key = above + field.name
        found += column_keys(_inner(field), f"{key}.") if _inner(field) else [key]
    return found


def holds_text(kind: "pyarrow.DataType") -> bool:
    """Return whether a column of this type can be read; its bytes are looked at later."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return holds_text(kind.storage_type)
    if pyarrow.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    return str(kind) in TEXT_TYPES


def read_column(batch: "pyarrow.RecordBatch", fields: "Sequence[pyarrow.Field]") -> list[bytes | None]:
    """Return the bytes of each row; None where it, or what it lies in, is null."""
    import pyarrow
    from pyarrow.compute import struct_field

    column = batch.column(fields[0].name)
    if fields[1:]:
        column = struct_field(column, [field.name for field in fields[1:]])
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return texts


def _inner(field: "pyarrow.Field") -> "list[pyarrow.Field]":
    import pyarrow

    kind = field.type
    return [kind.field(i) for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []

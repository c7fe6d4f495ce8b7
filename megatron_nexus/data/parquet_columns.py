"""Columns of parquet files that hold text: found by a path such as `doc.text`, read as bytes.

The caller has imported pyarrow to open the file.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ColumnSchema, FileMetaData

TEXT_TYPES = ("STRING", "JSON", "ENUM", "BSON", "NONE")
"""Logical types of texts."""


def find_columns(metadata: "FileMetaData") -> dict[str, int]:
    """Return the number of each column by its path, but for columns of lists."""
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    return {column.path: number for number, column in enumerate(columns) if not column.max_repetition_level}


def holds_text(column: "ColumnSchema") -> bool:
    """Return whether a column can be read; its bytes are looked at later."""
    kind = column.logical_type.type
    # UNKNOWN is a column without any value.
    return kind == "UNKNOWN" or (column.physical_type == "BYTE_ARRAY" and kind in TEXT_TYPES)


def read_column(batch: "pyarrow.RecordBatch") -> list[bytes | None]:
    """Return the bytes of each row of a batch of one column; None where it, or what it lies in, is null."""
    import pyarrow

    (column,) = batch.columns
    while pyarrow.types.is_struct(column.type):
        (column,) = column.flatten()
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    texts: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return texts

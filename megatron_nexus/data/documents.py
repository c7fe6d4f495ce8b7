"""Documents of input files: how the files are cut into spans of work, and what the records of a span are.

    .txt             one document a file, or one a line
    .jsonl, .json    one record a line, the text in one of its fields
    .parquet         one record a row, the text in one of its columns

A field may lie in others: `doc.text` is the field text of the field doc. So may columns of parquet files.

Uncompressed files of lines are cut anywhere: a line belongs to the span that its first byte is in. Parquet
files are cut between row groups, compressed ones not at all.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, NamedTuple

from megatron_nexus.base.json_text import NestingError, parse_record
from megatron_nexus.data.input_files import InputFile
from megatron_nexus.errors import DataError, raise_problems

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ColumnSchema, FileMetaData

LONGEST_RECORD_BYTES = 1 << 30
"""Longer lines and files are refused: lengths in the index are 32-bit, and workers hold a record."""

EXCERPT_CHARACTERS = 80
ROWS_PER_BATCH = 256
COUNTING_BYTES = 1 << 24
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NAMES_CHARACTERS = 200
TEXT_TYPES = ("STRING", "JSON", "ENUM", "BSON", "NONE")
"""Logical types of texts."""

REPORTED = 10
"""Malformed records that are shown."""
_ONE_A_LINE: Final = "write one JSON object a line; of an array, `jq -c '.[]' in.json > out.jsonl` makes them"
_REMEDIES: Final = {
    "not UTF-8": "convert the inputs to UTF-8, as `iconv -f latin1 -t utf-8 in > out` does from Latin-1",
    "not JSON": _ONE_A_LINE,
    "no JSON object": _ONE_A_LINE,
    "nested too deeply": "write records of fewer brackets within one another",
}
_ELSEWHERE: Final = "say where the text is with --json-keys or --txt-documents"


@dataclass(frozen=True)
class RecordFormat:
    """What in a file is a document."""

    json_key: str
    """Field of JSON records, column of parquet files; dots lead into nested ones."""
    txt_documents: Literal["file", "line"]
    """A .txt file is one document, or each of its lines is."""


@dataclass(frozen=True)
class FileSlice:
    """A part of a file that one worker reads in one go."""

    file: InputFile
    start: int
    stop: int
    """[start, stop): bytes, or row groups of a parquet file; everything of a compressed file."""
    first_record: int
    """Number of its first row in a parquet file, otherwise 0."""
    size: int
    """Its work, in bytes: on the disk, or for parquet those of the column before compression."""


class Document(NamedTuple):
    """A record's text."""

    text: str
    size: int
    """Its UTF-8 bytes."""


class Problem(NamedTuple):
    """Why a record cannot be read, and how it begins."""

    reason: str
    excerpt: str = ""


class BadRecord(NamedTuple):
    """A record that cannot be read."""

    file_slice: FileSlice
    number: int
    """Its line or row in the span, from 0."""
    reason: str
    excerpt: str

    def describe(self) -> str:
        """Return file, line, reason and excerpt; counts the lines before: seconds in a very large file."""
        number = self.file_slice.first_record + _lines_before(self.file_slice) + self.number + 1
        excerpt = f": {self.excerpt}" if self.excerpt else ""
        return f"{self.file_slice.file.path}:{number}: {self.reason}{excerpt}"


def split_into_slices(files: list[InputFile], reading: RecordFormat, slice_bytes: int) -> list[FileSlice]:
    """Return the files as spans of about `slice_bytes` each, in order.

    Raises ConfigError: files that cannot hold documents as they are: all of them are named.
    """
    problems: list[str] = []
    slices: list[FileSlice] = []
    for file in files:
        whole = FileSlice(file, 0, file.size, 0, file.size)
        if not file.size:
            continue
        if file.kind == "parquet":
            try:
                slices += _row_groups(file, reading.json_key, slice_bytes)
            except DataError as error:
                problems.append(str(error))
        elif file.kind == "txt" and reading.txt_documents == "file":
            if file.size > LONGEST_RECORD_BYTES:
                problems.append(
                    f"--input {file.path} has {file.size:,} bytes, a document at most "
                    f"{LONGEST_RECORD_BYTES:,}: use --txt-documents line, or split it"
                )
            slices.append(whole)
        elif file.compression:
            slices.append(whole)
        else:
            starts = range(0, file.size, slice_bytes)
            stops = [*starts[1:], file.size]
            slices += [FileSlice(file, a, b, 0, b - a) for a, b in zip(starts, stops, strict=True)]
    raise_problems(problems)
    return slices


def _row_groups(file: InputFile, key: str, slice_bytes: int) -> list[FileSlice]:
    with file.open_parquet() as table:
        metadata = table.metadata
        places = _find_columns(metadata)
        if key not in places:
            raise DataError(
                f"{file.path} has no column {key!r}, only {_excerpted(', '.join(places))}: name the column "
                "of the text with --json-keys"
            )
        place = places[key]
        column = metadata.schema.column(place)
        if not _holds_text(column):
            raise DataError(
                f"{file.path}: the column {key!r} is of type {column.physical_type}, which is not text: name "
                "the column of the text with --json-keys"
            )
        slices: list[FileSlice] = []
        first_group = first_row = rows = size = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            rows, size = rows + group.num_rows, size + group.column(place).total_uncompressed_size
            if size >= slice_bytes or index == metadata.num_row_groups - 1:
                slices.append(FileSlice(file, first_group, index + 1, first_row, size))
                first_group, first_row, rows, size = index + 1, first_row + rows, 0, 0
    return slices


def read_slice(file_slice: FileSlice, reading: RecordFormat) -> Iterator[Document | BadRecord]:
    """Yield the records of a span, in order; blank lines are empty documents.

    Raises DataError: the file cannot be read, is damaged or has changed since it was found.
    """
    file = file_slice.file
    try:
        for number, record in enumerate(_records(file_slice, reading)):
            yield record if isinstance(record, Document) else BadRecord(file_slice, number, *record)
        changed = file.has_changed()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file.path} cannot be read to its end ({error}): it is damaged or incomplete, copy it again"
        ) from None
    if changed:
        raise DataError(f"{file.path} was changed while it was read: run again when it is complete")


def _records(file_slice: FileSlice, reading: RecordFormat) -> Iterator[Document | Problem]:
    file = file_slice.file
    if file.kind == "parquet":
        yield from _rows(file_slice, reading.json_key)
        return
    with file.open() as stream:
        if file.kind == "txt" and reading.txt_documents == "file":
            yield _whole(stream)
        else:
            yield from _lines(file_slice, stream, reading)


def _whole(stream: BinaryIO) -> Document | Problem:
    raw = stream.read(LONGEST_RECORD_BYTES + 1)
    if len(raw) > LONGEST_RECORD_BYTES:
        return Problem("longer than 1 GiB")
    return _text(raw.removeprefix(BYTE_ORDER_MARK))


def _lines(file_slice: FileSlice, stream: BinaryIO, reading: RecordFormat) -> Iterator[Document | Problem]:
    position = file_slice.start
    if file_slice.start:
        # The line that begins before the span is its neighbour's, all of it; none does behind a line break.
        stream.seek(file_slice.start - 1)
        position += _skip_line(stream) - 1
    while file_slice.file.compression or position < file_slice.stop:
        line = stream.readline(LONGEST_RECORD_BYTES)
        if not line:
            return
        position += len(line)
        if len(line) == LONGEST_RECORD_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
            yield Problem("longer than 1 GiB")
            continue
        if position == len(line):
            line = line.removeprefix(BYTE_ORDER_MARK)
        if reading.txt_documents == "line" and file_slice.file.kind == "txt":
            yield _text(line.removesuffix(b"\n").removesuffix(b"\r"))
        else:
            yield _field(line, reading.json_key)


def _skip_line(stream: BinaryIO) -> int:
    """Read past the next line break; the bytes that were read."""
    skipped = 0
    while part := stream.readline(COUNTING_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _field(line: bytes, key: str) -> Document | Problem:
    """Return the text in a line of JSON."""
    try:
        record = parse_record(line.decode())
    except UnicodeDecodeError:
        return Problem("not UTF-8", _excerpt(line))
    except NestingError:
        return Problem("nested too deeply", _excerpt(line))
    except ValueError:
        if not line.strip():
            return Document("", 0)
        return Problem("not JSON", _excerpt(line))
    if not isinstance(record, dict):
        return Problem("no JSON object", _excerpt(line))
    text = record[key] if key in record else _within(record, key)
    if text is _MISSING:
        names = _excerpted(", ".join(map(repr, record)))
        return Problem(f"no key {key!r}", f"keys {names}")
    if not isinstance(text, str):
        return Problem(f"{key!r} is not a string", _excerpt(line))
    try:
        return Document(text, len(text) if text.isascii() else len(text.encode()))
    except UnicodeEncodeError:
        return Problem("lone surrogate", _excerpt(line))


_MISSING = object()


def _within(record: dict[str, object], key: str) -> object:
    """Return the value of a key that leads through fields of a record, or _MISSING."""
    for place, character in enumerate(key):
        name, rest = key[:place], key[place + 1 :]
        inner = record.get(name) if character == "." else None
        if isinstance(inner, dict):
            found = inner[rest] if rest in inner else _within(inner, rest)
            if found is not _MISSING:
                return found
    return _MISSING


def _rows(file_slice: FileSlice, key: str) -> Iterator[Document | Problem]:
    import pyarrow

    with file_slice.file.open_parquet() as table:
        batches = table.iter_batches(
            ROWS_PER_BATCH,
            row_groups=range(file_slice.start, file_slice.stop),
            columns=[key],
            use_threads=False,
        )
        try:
            for batch in batches:
                # As bytes: one text that is not UTF-8 must not cost the others.
                for raw in _read_column(batch):
                    yield Problem("null") if raw is None else _text(raw)
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from None


def _find_columns(metadata: "FileMetaData") -> dict[str, int]:
    """Return the number of each column by its path, but for columns of lists."""
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    return {column.path: number for number, column in enumerate(columns) if not column.max_repetition_level}


def _holds_text(column: "ColumnSchema") -> bool:
    """Return whether a column can be read; its bytes are looked at later."""
    kind = column.logical_type.type
    # UNKNOWN is a column without any value.
    return kind == "UNKNOWN" or (column.physical_type == "BYTE_ARRAY" and kind in TEXT_TYPES)


def _read_column(batch: "pyarrow.RecordBatch") -> list[bytes | None]:
    """Return the bytes of each row of a batch of one column; None where it, or what it lies in, is null."""
    import pyarrow

    (column,) = batch.columns
    while pyarrow.types.is_struct(column.type):
        (column,) = column.flatten()
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()


def _text(raw: bytes) -> Document | Problem:
    try:
        return Document(raw.decode(), len(raw))
    except UnicodeDecodeError:
        return Problem("not UTF-8", _excerpt(raw))


def _excerpt(raw: bytes) -> str:
    text = raw[: EXCERPT_CHARACTERS * 4].decode(errors="backslashreplace").strip()
    return repr(text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]} ...")


def _excerpted(names: str) -> str:
    return names if len(names) <= NAMES_CHARACTERS else f"{names[:NAMES_CHARACTERS]} ..."


def _lines_before(file_slice: FileSlice) -> int:
    """Return the line breaks in the file before the span's first own line."""
    if file_slice.file.kind == "parquet" or file_slice.start == 0:
        return 0
    count, left = 0, file_slice.start - 1
    with file_slice.file.open() as stream:
        while left and (block := stream.read(min(left, COUNTING_BYTES))):
            count, left = count + block.count(b"\n"), left - len(block)
        # The line around the start is the neighbour's.
        return count + (1 if _skip_line(stream) else 0)


def bad_record_lines(malformed: Mapping[str, int], samples: list[str]) -> list[str]:
    """Return lines that say how many records of each reason were left out, and show the first."""
    if not malformed:
        return []
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in malformed.items())
    left_out = sum(malformed.values())
    lines = [f"  {left_out:,} malformed record{'s' if left_out > 1 else ''} left out: {reasons}"]
    lines += [f"    {sample}" for sample in samples]
    return [*lines, "    ..."] if left_out > len(samples) else lines


def no_document(
    empty: int, malformed: Mapping[str, int], samples: list[str], empty_files: list[str]
) -> DataError:
    """Return the error of inputs without text: what they hold instead, and what to do about it.

    `empty_files` are the lines about those.
    """
    remedies = dict.fromkeys(_REMEDIES.get(reason, _ELSEWHERE) for reason in malformed or [""])
    held = [f"  {empty:,} records without text", *empty_files, *bad_record_lines(malformed, samples)]
    return DataError("\n".join(["the inputs hold no document:", *held, *remedies]))

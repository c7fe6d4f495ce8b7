"""Every record of every kind of file is read once, wherever it is cut, and bad ones say where they are."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_nexus.data.documents import BadRecord, Document, RecordFormat, read_slice, split_into_slices
from megatron_nexus.data.input_files import find_input_files
from megatron_nexus.errors import ConfigError, DataError

RECORD = RecordFormat(json_key="text", txt_documents="file")
LINE = RecordFormat(json_key="text", txt_documents="line")
TEXTS = ["first", "", "zwei \u00fc\u4e2d", "three\nlines\r\n", "x" * 300, " blanks\t ", "\ufefflast"]


def read(path: Path, reading: RecordFormat = RECORD, slice_bytes: int = 1 << 20) -> list[str]:
    """All records: texts, and what malformed ones say of themselves."""
    found = []
    for file_slice in split_into_slices(find_input_files([str(path)]), reading, slice_bytes):
        for record in read_slice(file_slice, reading):
            if isinstance(record, Document):
                assert record.size == len(record.text.encode())
                found.append(record.text)
            else:
                assert isinstance(record, BadRecord)
                found.append(record.describe())
    return found


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def test_lines_are_read_once_wherever_the_file_is_cut(tmp_path: Path) -> None:
    lines = [text.replace("\n", " ").replace("\r", " ") for text in TEXTS]
    for slice_bytes in (*range(1, 24), 37, 59, 1000):
        file = write(tmp_path / "a.jsonl", json_lines(TEXTS))
        assert read(file, RECORD, slice_bytes) == TEXTS, slice_bytes
        for end in ("\n", "\r\n"):
            for last in ("", end):
                file = write(tmp_path / "a.txt", (end.join(lines) + last).encode())
                assert read(file, LINE, slice_bytes) == lines, (slice_bytes, end, last)


def test_a_malformed_line_says_its_number_wherever_the_file_is_cut(tmp_path: Path) -> None:
    lines = json_lines(TEXTS).splitlines(keepends=True)
    file = write(tmp_path / "a.jsonl", b"".join([*lines[:5], b"{oops\n", *lines[5:]]))
    expected = [*TEXTS[:5], f"{file}:6: not JSON: '{{oops'", *TEXTS[5:]]
    for slice_bytes in range(1, 400, 7):
        assert read(file, RECORD, slice_bytes) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"{oops", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"1" * 5000 + b"}", "'text' is not a string"),
        (b'{"text": 1}', "'text' is not a string"),
        (b'["text"]', "no JSON object"),
        (b'{"Text": "a"}', "no key 'text': keys 'Text'"),
        (b'{"text": null}', "'text' is not a string"),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
    ],
)
def test_malformed_lines_cost_nothing_but_themselves(tmp_path: Path, line: bytes, reason: str) -> None:
    file = write(tmp_path / "a.jsonl", json_lines(["before"]) + line + b"\n" + json_lines(["after"]))
    before, malformed, after = read(file)
    assert (before, after) == ("before", "after")
    assert malformed.startswith(f"{file}:2: {reason}")
    assert len(malformed) < 600


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "7" * 5000, "1e400", "0." + "3" * 9000])
def test_numbers_of_other_fields_do_not_matter(tmp_path: Path, number: str) -> None:
    line = f'{{"id": {number}, "text": "kept", "more": [{{"n": {number}}}]}}\n'
    assert read(write(tmp_path / "a.jsonl", line.encode())) == ["kept"]


@pytest.mark.parametrize(
    ("key", "record", "expected"),
    [
        ("doc.text", {"doc": {"text": "in"}}, "in"),
        ("doc.text", {"doc.text": "whole", "doc": {"text": "in"}}, "whole"),
        ("a.b.c", {"a": {"b": {"c": "deep"}}}, "deep"),
        ("a.b.c", {"a.b": {"c": "dotted"}}, "dotted"),
        ("a.b.c", {"a": 1, "a.b": {"c": "dotted"}}, "dotted"),
        ("a.b.c", {"a": {"b.c": "inner"}}, "inner"),
        ("doc.text", {"doc": None}, "no key 'doc.text': keys 'doc'"),
        ("doc.text", {"doc": "text"}, "no key 'doc.text'"),
        ("doc.text", {"doc": {"text": 3}}, "'doc.text' is not a string"),
        ("doc", {"doc": {"text": "in"}}, "'doc' is not a string"),
        ("doc..text", {"doc": {"": {"text": "in"}}}, "in"),
    ],
)
def test_a_key_with_dots_leads_into_nested_fields(
    tmp_path: Path, key: str, record: dict[str, object], expected: str
) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps(record).encode())
    assert read(file, RecordFormat(key, "file"))[0].removeprefix(f"{file}:1: ").startswith(expected)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    press = {".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    lines = json_lines(TEXTS * 50).splitlines(keepends=True)
    # Two members, as `cat` and parallel compressors leave them.
    raw = press(b"".join(lines[:9])) + press(b"".join(lines[9:]))
    assert read(write(tmp_path / f"a.jsonl{ending}", raw), RECORD, 100) == TEXTS * 50
    assert read(write(tmp_path / f"a.txt{ending}", press(b"a\nb"))) == ["a\nb"]
    for damaged in (raw[:-9], raw[:40] + bytes(20) + raw[60:], b"plain text"):
        with pytest.raises(DataError, match=f"a.jsonl{ending} cannot be read to its end"):
            read(write(tmp_path / f"a.jsonl{ending}", damaged))


@pytest.mark.parametrize("slice_bytes", [1, 200, 1 << 20])
def test_parquet(tmp_path: Path, slice_bytes: int) -> None:
    texts = [*TEXTS, None, *TEXTS]
    table = pa.table({"id": [*range(15)], "text": pa.array(texts, pa.large_string())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    assert read(tmp_path / "a.parquet", RECORD, slice_bytes) == [
        *TEXTS,
        f"{tmp_path / 'a.parquet'}:8: null",
        *TEXTS,
    ]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()],
    ids=str,
)
def test_every_arrow_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["a", None, "zwei ü", "", "a", "zwei ü"]
    plain = pa.array(texts, kind)
    columns = {"plain": plain, "struct": pa.StructArray.from_arrays([plain, plain], ["text", "more.text"])}
    views = "view" in str(kind)  # which pyarrow neither encodes as a dictionary nor cuts
    if not views:
        encoded = plain.dictionary_encode()
        columns |= {"encoded": encoded, "within": pa.StructArray.from_arrays([encoded], ["text"])}
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file, row_group_size=6 if views else 4)
    for key in ("plain", "struct.text", "struct.more.text", "encoded", "within.text"):
        if key.split(".")[0] in columns:
            expected = [f"{file}:2: null" if text is None else text for text in texts]
            assert read(file, RecordFormat(key, "file"), 1) == expected, key
    if "binary" in str(kind):
        pq.write_table(pa.table({"text": pa.array([b"a", b"\xff"], kind)}), file)
        assert read(file) == ["a", rf"{file}:2: not UTF-8: '\\xff'"]


def test_texts_of_extension_types_and_columns_without_any_value(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    record = pa.array([{"text": "in"}, None, {"text": None}])
    pq.write_table(
        pa.table({"json": pa.array(["{}", None, "[]"], pa.json_()), "none": pa.nulls(3), "doc": record}), file
    )
    assert read(file, RecordFormat("json", "file")) == ["{}", f"{file}:2: null", "[]"]
    assert read(file, RecordFormat("none", "file")) == [f"{file}:{row}: null" for row in (1, 2, 3)]
    assert read(file, RecordFormat("doc.text", "file")) == ["in", f"{file}:2: null", f"{file}:3: null"]


def test_a_column_that_is_no_text_is_answered_by_those_that_are_there(tmp_path: Path) -> None:
    table = pa.table(
        {
            "doc": pa.array([{"text": "a", "inner": {"n": 1}}]),
            "words": pa.array([["a"]]),
            "digest": pa.array([b"abcd"], pa.binary(4)),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    there = "only doc.text, doc.inner.n, digest"
    for key, message in {
        **{key: f"no column {key!r}, {there}" for key in ("doc", "doc.inner", "doc.nothing", "words")},
        "words.list.element": there,
        "doc.inner.n": "type INT64",
        "digest": "type FIXED_LEN_BYTE_ARRAY",
    }.items():
        with pytest.raises(ConfigError) as caught:
            read(tmp_path / "a.parquet", RecordFormat(key, "file"))
        assert message in str(caught.value) and "--json-keys" in str(caught.value), key


def test_a_parquet_text_that_is_not_utf8_costs_nothing_but_itself(tmp_path: Path) -> None:
    raw = pa.array([b"before", b"\xff", b"after"], pa.binary())
    column = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        "before",
        rf"{tmp_path / 'a.parquet'}:2: not UTF-8: '\\xff'",
        "after",
    ]


def test_parquet_files_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", b"PAR1 no parquet PAR1")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        f"{tmp_path / 'a.parquet'} has no column 'text', only content",
        f"{tmp_path / 'b.parquet'}",
        caught.value.problems[2].split(":")[0],
    ]
    assert "c.parquet is not a parquet file" in caught.value.problems[2]
    pq.write_table(pa.table({"text": ["a" * 5000] * 50}), tmp_path / "d.parquet", compression="none")
    raw = bytearray((tmp_path / "d.parquet").read_bytes())
    raw[10:40] = bytes(30)
    write(tmp_path / "d.parquet", bytes(raw))
    with pytest.raises(DataError, match=r"d\.parquet cannot be read to its end"):
        read(tmp_path / "d.parquet")


def test_text_files_and_byte_order_marks(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\ufeffone\r\n\ntwo\n".encode())
    assert read(file) == ["one\r\n\ntwo\n"]
    assert read(file, LINE) == ["one", "", "two"]
    assert read(write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + json_lines(["one"]))) == ["one"]
    assert read(write(tmp_path / "c.txt", b"a\xff")) == [rf"{tmp_path / 'c.txt'}:1: not UTF-8: 'a\\xff'"]


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    records = read_slice(split_into_slices(find_input_files([str(file)]), RECORD, 1 << 20)[0], RECORD)
    next(records)
    write(file, json_lines([*TEXTS, "more"]))
    with pytest.raises(DataError, match="was changed while it was read"):
        list(records)


def test_files_folders_and_globs(tmp_path: Path) -> None:
    for name in (
        "b/z.txt",
        "b/a.txt.gz",
        "b/.hidden/x.txt",
        "b/readme.md",
        "c1.json",
        "c0.jsonl",
        "d.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, b"x")
    found = find_input_files([str(tmp_path / name) for name in ("d.parquet", "b", "c*")])
    assert [str(file.path.relative_to(tmp_path)) for file in found] == [
        "d.parquet",
        "b/a.txt.gz",
        "b/z.txt",
        "c0.jsonl",
        "c1.json",
    ]


def test_all_inputs_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    write(tmp_path / "empty.txt", b"")  # which is left out, or under --strict refused
    write(tmp_path / "a.pdf", b"x")
    (tmp_path / "folder").mkdir()
    names = ("a.txt", "missing.txt", "*.csv", "empty.txt", "a.pdf", "folder", "*.txt")
    arguments = [str(tmp_path / name) for name in names]
    with pytest.raises(ConfigError) as caught:
        find_input_files(arguments)
    assert "is empty" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"empty\.txt is empty: leave it out, or run without --strict"):
        find_input_files(arguments, strict=True)
    said = "\n".join(caught.value.problems)
    for part in (
        "missing.txt stands for no file",
        "*.csv stands",
        "a.pdf is of no known",
    ):
        assert part in said
    assert "folder holds no file" in said
    assert f"*.txt names {tmp_path / 'a.txt'} again" in said

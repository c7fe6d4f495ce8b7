"""Input files of text: what the arguments of --input stand for, and how each file is read."""

import glob
import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from megatron_nexus.errors import DataError, raise_problems

if TYPE_CHECKING:
    import pyarrow.parquet

Kind = Literal["txt", "jsonl", "parquet"]
KINDS: dict[str, Kind] = {".txt": "txt", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
"""Kinds of files by ending; Megatron-LM's documentation calls JSON lines .json."""
COMPRESSIONS = (".gz", ".zst")
ENDINGS = ".txt, .jsonl or .json (one record a line), each also with .gz or .zst, and .parquet"
LARGEST_WINDOW_BYTES = 1 << 31
"""Largest window of a .zst file that is read: `zstd --ultra --long=31` writes it."""
READ_BYTES = 1 << 20
NAMED = 10
"""Empty files that are named."""


@dataclass(frozen=True)
class InputFile:
    """A file and the state it was found in."""

    path: Path
    kind: Kind
    compression: str
    """.gz, .zst or nothing."""
    size: int
    """In bytes, on the disk."""
    modified_ns: int

    def open(self) -> BinaryIO:
        """Open the file for reading, decompressed.

        Raises DataError: a package that its compression needs is missing; OSError, EOFError, also in reading.
        """
        if self.compression == ".gz":
            return io.BufferedReader(gzip.GzipFile(self.path), READ_BYTES)
        if self.compression == ".zst":
            return io.BufferedReader(_ZstdFile(self.path), READ_BYTES)
        return self.path.open("rb", buffering=READ_BYTES)

    def open_parquet(self) -> "pyarrow.parquet.ParquetFile":
        """Open the table of a parquet file. Raises DataError: it cannot be read, or pyarrow is missing."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise _missing(self.path, "pyarrow") from None
        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.path} is not a parquet file ({error}): copy it again") from None

    def has_changed(self) -> bool:
        """Return whether somebody wrote to it since it was found."""
        now = self.path.stat()
        return (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns)


def find_input_files(arguments: list[str], strict: bool = False) -> list[InputFile]:
    """Return the files that files, folders and globs stand for, in the order given, of a folder by name.

    Of a folder all files of known kinds are taken, those of its subfolders too, hidden ones left out.

    Raises ConfigError: an argument stands for no file, a file is of unknown kind or named twice, or, where
    `strict`, empty.
    """
    problems: list[str] = []
    files: dict[Path, InputFile] = {}
    for argument in arguments:
        paths = _expand(argument)
        if not paths:
            where = "holds no file that can be read" if Path(argument).is_dir() else "stands for no file"
            problems.append(f"--input {argument} {where}: give {ENDINGS}, folders or globs of them")
        for path in paths:
            file = _recognise(path)
            if isinstance(file, str):
                problems.append(file)
            elif path.resolve() in files:
                problems.append(f"--input {argument} names {path} again: name every file once")
            elif strict and not file.size:
                problems.append(f"--input {path} is empty: leave it out, or run without --strict")
            else:
                files[path.resolve()] = file
    raise_problems(problems)
    return list(files.values())


def empty_file_lines(files: list[InputFile]) -> list[str]:
    """Return lines that say how many files of 0 bytes were left out, and name the first."""
    empty = [str(file.path) for file in files if not file.size]
    if not empty:
        return []
    more = f" and {len(empty) - NAMED:,} more" if len(empty) > NAMED else ""
    files_are = "file is" if len(empty) == 1 else "files are"
    return [f"  {len(empty):,} {files_are} empty and left out: {', '.join(empty[:NAMED])}{more}"]


def _expand(argument: str) -> list[Path]:
    path = Path(argument)
    if path.is_dir():
        return [
            found
            for found in sorted(path.rglob("*"))
            if found.is_file()
            and _kind(found) is not None
            and not any(part.startswith(".") for part in found.relative_to(path).parts)
        ]
    if path.is_file():
        return [path]
    return [found for name in sorted(glob.glob(argument, recursive=True)) if (found := Path(name)).is_file()]  # noqa: PTH207 - pathlib has no absolute globs


def _kind(path: Path) -> tuple[Kind, str] | None:
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = KINDS.get((path.with_suffix("") if compression else path).suffix)
    return None if kind is None or (kind == "parquet" and compression) else (kind, compression)


def _recognise(path: Path) -> InputFile | str:
    """Return the file, or what is wrong with it."""
    kind = _kind(path)
    if kind is None:
        return f"--input {path} is of no known kind: give {ENDINGS}"
    try:
        with path.open("rb"):
            state = path.stat()
    except OSError as error:
        return f"--input {path} cannot be read ({error.strerror}): make it readable or leave it out"
    return InputFile(path, *kind, state.st_size, state.st_mtime_ns)


def _missing(path: Path, package: str) -> DataError:
    return DataError(f"{path} needs the package {package}, which is not installed: pip install {package}")


class _ZstdFile(io.RawIOBase):
    """The decompressed bytes of a .zst file of any number of frames.

    The package's own stream ends in silence where the last frame is cut off.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise _missing(path, "zstandard") from None
        self._failure = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False
        self._compressed = b""
        self._ready = memoryview(b"")
        self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            self._compressed = self._compressed or self._file.read(READ_BYTES // 8)
            if not self._compressed:
                if self._in_frame:
                    raise EOFError("its last frame is cut off")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._failure as error:
                raise OSError(str(error)) from None
            self._compressed, self._in_frame = b"", True
            if self._frame.eof:
                self._compressed, self._in_frame = self._frame.unused_data, False
                self._frame = self._decompressor.decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

"""An error of a file that nothing else answers names the flag, the path, the rule and the remedy."""

import os
import sys
from pathlib import Path

import pytest

from megatron_nexus.cli.arguments import output_problems, read_text
from megatron_nexus.errors import ConfigError, flag_errors, path_errors

LONG = "x" * 300


@pytest.mark.parametrize(
    ("words", "path", "expected"),
    [
        (
            f"--tp 1 --save {LONG}",
            f"{LONG}/iter",
            f"--save {LONG[:100]}... (305 characters): File name too long",
        ),
        (f"--save={LONG}", LONG, f"--save {LONG[:100]}... (300 characters)"),
        (f"--output-prefix ./{LONG} --x y", f"{LONG}.bin", "--output-prefix x"),
        (f"--valid-data-path web={LONG}", f"{LONG}.idx", "--valid-data-path x"),
        (f"--save out --load {LONG}", f"{Path.cwd()}/{LONG}", "--load /"),
        (f"--load {LONG} --save y", f"{LONG}y", f"  {LONG[:100]}"),
        (LONG, LONG, f"  {LONG[:100]}"),
        ("--tp 1", LONG, f"  {LONG[:100]}"),
    ],
)
def test_a_path_is_named_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, words: str, path: str, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool.py", *words.split()])
    with pytest.raises(ConfigError) as caught, path_errors():
        Path(path).stat()
    assert expected in str(caught.value)
    assert "give a shorter name, of at most 255 bytes" in str(caught.value)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one that exists"), path_errors():
        (tmp_path / "missing").read_bytes()
    with pytest.raises(BrokenPipeError), path_errors():
        read, write = os.pipe()
        os.close(read)
        try:
            os.write(write, b"x")
        finally:
            os.close(write)


@pytest.mark.parametrize(
    ("path", "is_folder", "expected"),
    [
        ("file/x.json", False, "file is a file: give another"),
        ("file/x/y.json", False, "file is a file: give another"),
        ("file/x/y", True, "file is a file: give another"),
        ("file", True, "is a file: give a folder"),
        (".", False, "is a folder: add the name of a file"),
        ("no/x.json", False, "its folder does not exist"),
        ("no/x", True, None),
        ("file", False, None),
        ("x.json", False, None),
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(
    tmp_path: Path, path: str, is_folder: bool, expected: str | None
) -> None:
    (tmp_path / "file").touch()
    found = list(output_problems("--output", tmp_path / path, is_folder))
    if expected is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith("--output ") and expected in found[0]


def test_a_full_disk_names_the_flag() -> None:
    with pytest.raises(ConfigError) as caught, flag_errors("--output", "/dev/full"):
        Path("/dev/full").write_text("x")
    assert "--output /dev/full: No space left on device: free some space" in str(caught.value)


def test_a_text_keeps_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"a\r\nb\rc\n")
    assert read_text("--perplexity", tmp_path / "text") == "a\r\nb\rc\n"
    with pytest.raises(ConfigError, match=r"--perplexity .*: Is a directory"):
        read_text("--perplexity", tmp_path)

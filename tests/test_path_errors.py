"""An error of a file that nothing else answers names the flag, the path, the rule and the remedy."""

import os
import sys
from pathlib import Path

import pytest

from megatron_nexus.errors import ConfigError, path_errors

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

"""The installed package offers what the repository does: each tool as a command, under the same hints."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_nexus.commands.outcome import pretrain_command

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_every_tool_is_a_command_and_every_command_exists() -> None:
    commands = {target.removesuffix(":main") for target in PROJECT["scripts"].values()}
    tools = {f"megatron_nexus.commands.{path.stem}" for path in (REPOSITORY / "tools").glob("*.py")}
    assert commands == {"megatron_nexus.command", *tools}
    assert all(callable(importlib.import_module(name).main) for name in commands)


@pytest.mark.parametrize(
    ("started", "line"),
    [
        ("tools/import_hf.py", "deepspeed --num_gpus 2 pretrain_nexus.py --load 'a b'"),
        ("../fresh/tools/import_hf.py", "deepspeed --num_gpus 2 ../fresh/pretrain_nexus.py --load 'a b'"),
        ("/usr/bin/nexus-import-hf", "nexus-pretrain --load 'a b'"),
    ],
)
def test_a_tool_names_the_next_command_in_the_spelling_in_which_it_was_started(
    started: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert pretrain_command("--load", "a b", ranks=2) == line

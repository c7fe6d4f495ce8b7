"""The installed package offers what the repository does: each tool as a command, under the same hints."""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_nexus import __version__
from megatron_nexus.commands.outcome import pretrain_command
from megatron_nexus.extras import EXTRAS, install_command

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


def told_by(
    command: str, flag: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", [command, flag])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(command).main()
    assert ended.value.code == 0
    return console.readouterr().out


COMMANDS = sorted(target.removesuffix(":main") for target in PROJECT["scripts"].values())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_version(
    command: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    assert told_by(command, "--version", monkeypatch, console) == f"megatron_nexus {__version__}\n"


def test_what_messages_have_users_install_is_what_the_extras_say() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {name: list(packages) for name, packages in EXTRAS.items()} == {
        name: extras[name] for name in EXTRAS
    }
    assert install_command("eval") == "pip install 'lm-eval>=0.4.13,<0.5' 'datasets>=4'"
    sources = [*(REPOSITORY / "megatron_nexus").rglob("*.py"), REPOSITORY / "README.md"]
    assert not [path for path in sources if re.search(r"megatron[-_]nexus\[", path.read_text())]


FOREIGN = {
    "deepspeed": "num_gpus num_nodes num_accelerators include exclude hostfile module master_port",
    "torchrun": "nproc-per-node",
    "srun, scancel": "mpi kill-on-bad-exit signal",
    "zstd": "long ultra",
    "hf download": "local-dir",
}


def test_every_flag_that_the_sources_name_exists(
    monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    """Messages name remedies by their flags; docstrings and comments are held to it too."""
    flag = re.compile(r"(?<![\w-])--[a-z][\w-]*")
    known = {f"--{name}" for names in FOREIGN.values() for name in names.split()}
    for command in COMMANDS:
        known |= set(flag.findall(told_by(command, "--help", monkeypatch, console)))
    known |= {name.replace("--", "--no-", 1) for name in known}
    # Parts of names that messages put together, and other spellings that are read.
    known |= {"--base-", "--local_rank", "--local-rank", "--deepspeed", "--no-", "--moe-"}
    unknown = {
        (path.name, name)
        for path in (REPOSITORY / "megatron_nexus").rglob("*.py")
        if path.name != "megatron_flags.py"  # which answers those that do not exist
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in flag.findall(node.value)
        if name not in known
    }
    assert unknown == set()

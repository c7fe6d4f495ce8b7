"""The installed package has one command, whose verbs the files of the repository are."""

import importlib
import re
import sys
import tomllib

import pytest

from megatron_nexus import __version__
from megatron_nexus.base.invocation import FILES, with_commands
from megatron_nexus.cli.main import main
from megatron_nexus.cli.next_command import train_command
from megatron_nexus.cli.verbs import VERBS
from megatron_nexus.extras import EXTRAS, install_command
from tests.support.paths import REPOSITORY
from tests.support.sources import SOURCES, STANDALONE, source

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_one_command_has_all_verbs_and_each_file_is_one_of_them() -> None:
    assert PROJECT["scripts"] == {"nexus": "megatron_nexus.cli.main:main"}
    files = {"pretrain_nexus.py", *(f"tools/{path.name}" for path in (REPOSITORY / "tools").glob("*.py"))}
    assert set(FILES.values()) == files
    assert FILES.keys() <= VERBS.keys()
    for verb, file in FILES.items():
        assert f'main("{verb}")' in (REPOSITORY / file).read_text()
    for verb in VERBS.values():
        assert callable(importlib.import_module(f"megatron_nexus.cli.{verb.module}").run)


@pytest.mark.parametrize(
    ("started", "line", "inspect"),
    [
        (
            "tools/import_hf.py",
            "deepspeed --num_gpus 2 pretrain_nexus.py --load 'a b'",
            "python tools/inspect_checkpoint.py",
        ),
        (
            "../fresh/tools/import_hf.py",
            "deepspeed --num_gpus 2 ../fresh/pretrain_nexus.py --load 'a b'",
            "python ../fresh/tools/inspect_checkpoint.py",
        ),
        (
            "../pretrain_nexus.py",
            "deepspeed --num_gpus 2 ../pretrain_nexus.py --load 'a b'",
            "python ../tools/inspect_checkpoint.py",
        ),
        ("/usr/bin/nexus", "nexus launch --num_gpus 2 train --load 'a b'", "nexus inspect"),
        (
            "/x/megatron_nexus/__main__.py",
            "python -m megatron_nexus launch --num_gpus 2 train --load 'a b'",
            "python -m megatron_nexus inspect",
        ),
    ],
)
def test_messages_name_commands_in_the_spelling_in_which_the_process_was_started(
    started: str, line: str, inspect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert train_command("--load", "a b", ranks=2) == line
    assert with_commands("see `nexus inspect`") == f"see `{inspect}`"


def told_by(
    verb: str, flag: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["nexus", verb, flag])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return console.readouterr().out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "launch"])
def test_every_verb_prints_its_version(
    verb: str, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    assert told_by(verb, "--version", monkeypatch, console) == f"megatron_nexus {__version__}\n"


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
    for verb in VERBS:
        known |= set(flag.findall(told_by(verb, "--help", monkeypatch, console)))
    known |= {name.replace("--", "--no-", 1) for name in known}
    # Parts of names that messages put together, and other spellings that are read.
    known |= {
        "--base-",
        "--lr-decay-",
        "--lr-warmup-",
        "--lr-wsd-decay-",
        "--local_rank",
        "--local-rank",
        "--deepspeed",
        "--no-",
        "--moe-",
    }
    unknown = {
        (path.name, name)
        for path in (*SOURCES, *STANDALONE.glob("*.py"))
        if path.name != "megatron_flags.py"  # which answers those that do not exist
        and path.parent.name != "reports"  # custom properties of style sheets look like flags
        for text in source(path).strings
        for name in flag.findall(text)
        if name not in known
    }
    assert unknown == set()

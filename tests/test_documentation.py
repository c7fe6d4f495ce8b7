"""What README and docs say is so: commands are parsed or run, outputs compared, messages and files exist.

`<!-- needs: network -->` (or cluster, or gpu) before a fence says why its commands cannot run here; the
commands of this package in it are parsed all the same.
"""

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest

from megatron_nexus import api
from megatron_nexus.cli.main import main
from megatron_nexus.cli.verbs import VERBS
from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.rules import check
from tests.support.paths import REPOSITORY
from tests.support.sources import SOURCES, source
from tests.support.waiting import TIMEOUT_S
from tests.support.warm_programs import warm_bin, warm_path

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
NEEDS = ("network", "cluster", "gpu")
FENCE = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```bash\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of a fence of a page: its words, the variables set before it, and what it needs."""

    page: str
    words: tuple[str, ...]
    variables: tuple[str, ...]
    needs: str

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands_of(page: Path) -> Iterator[Command]:
    for needs, text in FENCE.findall(page.read_text()):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\|?", line):
                words = shlex.split(part, comments=True)
                variables = list(takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
                if words[len(variables) :]:
                    yield Command(page.name, tuple(words[len(variables) :]), tuple(variables), needs)


COMMANDS = [command for page in PAGES for command in commands_of(page)]


class ParsedError(Exception):
    """Ends a verb when its flags have been parsed."""


def parse(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the words after `nexus` by the parser of the verb, and check the configuration of a run."""
    verb, *flags = words
    if verb == "launch":
        flags = flags[flags.index("train") + 1 :]
    elif verb != "train":
        real = FlagParser.parse_args

        def parse_args(parser: FlagParser, args: list[str] | None = None) -> None:
            real(parser, args)
            raise ParsedError

        with monkeypatch.context() as patch:
            patch.setattr(FlagParser, "parse_args", parse_args)
            with pytest.raises(ParsedError):
                run = importlib.import_module(f"megatron_nexus.cli.{VERBS[verb].module}").run
                run(flags, *(["unlearn"] if verb == "unlearn" else []))
        return
    given = given_flags(flags)
    if given.keys().isdisjoint(("load", "config")):
        config = build(given)
        check(config, config.model_parallel_size)


def exists(name: str) -> bool:
    return (REPOSITORY / name).is_file()


def check_pip(command: Command) -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert command.needs == "network", f"{command}: add <!-- needs: network --> before the fence"
    words = iter(command.words[2:])
    for word in words:
        if word == "-r":
            assert exists(next(words)), command
        elif found := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(found[1].split(",")) <= extras.keys(), command


def check_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command as far as that is possible without running it."""
    program, *words = command.words
    match program:
        case "nexus":
            if words == ["--help"]:
                pass
            elif words[1:] == ["--help"]:
                assert words[0] in VERBS, command
            else:
                parse(tuple(words), monkeypatch)
        case "deepspeed" | "torchrun" | "mpirun" | "srun" | "python":
            if "nexus" in words:
                return check_command(
                    Command(command.page, command.words[1 + words.index("nexus") :], (), ""), monkeypatch
                )
            if words[:2] == ["-m", "venv"]:
                return None
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            assert exists(words[script]), command
            if words[script] == "pretrain_nexus.py":
                parse(("train", *words[script + 1 :]), monkeypatch)
        case "bash" | "sbatch":
            script = next(word for word in words if "/" in word)
            text = (REPOSITORY / script).read_text()
            assert all(f"${{{name.split('=')[0]}:" in text for name in command.variables), command
        case "pip":
            check_pip(command)
        case "docker":
            if words[0] == "build":
                assert (
                    f" AS {words[words.index('--target') + 1]}\n" in (REPOSITORY / "Dockerfile").read_text()
                )
            assert command.needs == "network", command
        case "hf":
            assert command.needs == "network", command
        case "mkdocs":
            assert exists("mkdocs.yml")
        case "git" | "apptainer":
            assert command.needs in ("network", "cluster"), command
        case "squeue" | "sacct" | "tail":
            assert command.needs == "cluster", command
        case "export" | "." | "cd" | "python3":
            pass
        case _:
            raise AssertionError(f"{command}: how is this command to be checked?")
    return None


def test_what_fences_need_is_one_of_three_things() -> None:
    assert {command.needs for command in COMMANDS} <= {*NEEDS, ""}
    for page in PAGES:
        text = page.read_text()
        marks = re.findall(r"^<!-- needs: ", text, re.MULTILINE)
        assert len(marks) == sum(bool(needs) for needs, _ in FENCE.findall(text)), page.name


@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS}))
def test_the_commands_of_a_page_exist_with_their_flags(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS:
        if command.page == page:
            try:
                check_command(command, monkeypatch)
            except BaseException as error:
                error.add_note(str(command))
                raise


def test_the_commands_of_all_pages_were_found() -> None:
    assert {command.page for command in COMMANDS} >= {"README.md", "growth.md", "clusters.md", "data.md"}
    assert {command.words[1] for command in COMMANDS if command.words[0] == "nexus"} >= VERBS.keys() - {
        "completion"
    }


def test_a_flag_that_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ("nexus grow --nexus-b 3", "nexus train --tp 2 --sped 3", "nexus plot a --outptu b"):
        with pytest.raises(Exception, match="unknown flag"):
            check_command(Command("", tuple(words.split()), (), ""), monkeypatch)


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FOREIGN = {
    "deepspeed, torchrun, mpirun": "--num_gpus --nproc-per-node --no-python --master_port --map-by "
    "--max-restarts "
    "--redirects --enable_each_rank_log --output-filename",
    "SLURM": "--kill-on-bad-exit --signal --requeue --ntasks-per-node --cpus-per-task --gpus-per-task "
    "--gpus-per-node --partition --time --dependency --wait --nodes --ntasks --me --format "
    "--container-image --container-mounts --container-workdir",
    "apptainer": "--nv --bind",
    "docker": "--target --rm --shm-size",
    "pip, hf, mkdocs": "--extra-index-url --no-deps --repo-type --local-dir --strict",
}


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]) -> set[str]:
    """The flags of all verbs, as their help lists them."""
    found: set[str] = set()
    for verb in VERBS:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(sys, "argv", ["nexus", verb, "--help"])
            main()
        found |= set(FLAG.findall(console.readouterr().out))
    return found


def test_every_flag_in_the_text_exists(flags: set[str]) -> None:
    known = flags | {flag for words in FOREIGN.values() for flag in words.split()}
    for program in [*(REPOSITORY / "benchmarks").glob("*.py"), *(REPOSITORY / "tests").rglob("*_worker.py")]:
        known |= set(FLAG.findall(program.read_text()))
    known |= {name.replace("--", "--no-", 1) for name in known}
    texts = {page.name: page.read_text() for page in PAGES}
    assert {
        (page, name) for page in texts for name in FLAG.findall(texts[page]) if name not in known
    } == set()


def test_the_python_of_the_api_page_calls_what_exists_with_settings_that_exist(flags: set[str]) -> None:
    page = (DOCS / "python_api.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    calls = [
        node
        for node in ast.walk(ast.parse(program))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "api"
    ]
    assert len(calls) == 6
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        own = inspect.signature(getattr(api, call.func.attr)).parameters
        for keyword in call.keywords:
            assert keyword.arg in own or f"--{str(keyword.arg).replace('_', '-')}" in flags, keyword.arg
    assert all(
        f"| `{name}` |" in page for name in ("configure", "train", "open_run", "load", "grow", "unlearn")
    )


def test_the_readme_is_short_and_says_first_what_is_needed_and_untested() -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    screen = "\n".join(lines[:20])
    assert all(fact in screen for fact in ("Linux", "3.11", "3.13", "Never run on a GPU"))
    text = "\n".join(lines)
    assert text.index("download.pytorch.org/whl/cpu") < text.index("pip install -r requirements.txt")


PROGRAMS = [
    pytest.param(program, printed, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "paper_numbers.md"  # tests/cli/test_count_model.py
    for number, (program, printed) in enumerate(
        re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page.read_text(), re.DOTALL)
    )
]


@pytest.mark.parametrize(("program", "printed"), PROGRAMS)
def test_a_page_calculates_what_it_says(program: str, printed: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(program, {})
    assert said.getvalue() == printed


NAMED = re.compile(
    r"`((?:megatron_nexus|tests|tools|examples|benchmarks|docs)/[\w./+-]+"
    r"|(?:base|checkpoint|cli|config|data|growth|models|parallel|planner|spec|training)/[\w./]+)`"
)


def test_every_file_that_a_page_names_exists() -> None:
    missing = {
        (page.name, name)
        for page in PAGES
        for name in NAMED.findall(page.read_text())
        if not (REPOSITORY / name).exists() and not (REPOSITORY / "megatron_nexus" / name).exists()
    }
    assert missing == set()


def test_every_message_of_the_troubleshooting_page_occurs_in_the_code() -> None:
    quoted = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    said = "\n".join(
        " ".join(text.replace("\0", "VALUE").split()) for path in SOURCES for text in source(path).messages
    )
    # `...` stands for values and for what is left out.
    parts = [[re.escape(part) for part in text.split("...") if part] for text in quoted]
    unknown = [found for found in parts if not re.search(".*?".join(found), said)]
    assert unknown == []


TINY = (
    "--vocab-size 300 --num-layers 2 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--ffn-hidden-size 24 --nexus-m 20 --nexus-a 24 --seq-length 32 --micro-batch-size 2 "
    "--global-batch-size 4 --eval-iters 1 --data-path corpus --tokenizer-model spm.model --split 8,2"
)
LAST = {"": "2", "150": "3", "200": "4"}
"""Steps of a shrunk run by those that the page says."""


def shrunk(words: tuple[str, ...]) -> list[str]:
    """Return a command of the page for a small model and few steps."""
    flags = list(words)
    for flag, value in (("--preset", "nexusformer-tiny"), ("--world-size", "2")):
        if flag in flags:
            flags[flags.index(flag) + 1] = value
    if flags[0] != "train" or "--dry-run" in flags:
        return flags
    said = flags[flags.index("--train-iters") + 1] if "--train-iters" in flags else ""
    if "--load" not in flags:
        flags += shlex.split(TINY)
    return [*flags, "--train-iters", LAST[said]]


@pytest.mark.slow
def test_the_commands_of_the_first_page_run_one_after_the_other(tmp_path: Path) -> None:
    nexus = [str(warm_bin() / "python"), "-m", "megatron_nexus"]
    environment = {**os.environ, "PATH": warm_path(), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(words: list[str]) -> str:
        done = subprocess.run(
            [*nexus, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    (tmp_path / "texts.txt").write_text(
        "\n".join(f"def main_{i}(): return {i} + {'word ' * (i % 40)}" for i in range(400))
    )
    reading = "--input texts.txt --txt-documents line"
    run(shlex.split(f"train-tokenizer {reading} --vocab-size 300 --output spm.model"))
    run(shlex.split(f"preprocess {reading} --output-prefix corpus --tokenizer-model spm.model"))
    said = {
        command.words[1:]: run(shrunk(command.words[1:]))
        for command in commands_of(DOCS / "getting_started.md")
        if command.words[0] == "nexus"
    }
    outputs = "\n".join(said.values())
    assert "resumed runs/a/iter_0000002" in outputs and "resumed runs/b/iter_0000003" in outputs
    assert "verified in float64" in outputs
    assert (tmp_path / "losses.png").stat().st_size > 10_000


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built from this repository; fails on any warning."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_no_page_loads_anything_from_a_network(site: Path) -> None:
    loads = re.compile(
        r"""<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    assert {(page.name, url) for page in pages for url in loads.findall(page.read_text())} == set()
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"@import|url\([\"']?(?:https?:)?//", styles)


@pytest.mark.slow
def test_the_reference_has_every_flag_verb_and_module_and_formulas_are_markup(site: Path) -> None:
    flags = (site / "reference" / "configuration.html").read_text()
    assert all(f'id="{name}"' in flags for name in ("nexus-m", "zero-stage", "train-tokens", "keep-latest"))
    verbs = (site / "reference" / "cli.html").read_text()
    assert all(f"usage: nexus {verb}" in verbs for verb in VERBS)
    assert (
        "class_row" not in flags
        and "CheckpointReader" in (site / "reference/api/checkpoint.html").read_text()
    )
    assert "<mfrac>" in (site / "growth.html").read_text()
    assert "Nexus" in (site / "search" / "search_index.js").read_text()

"""Fixtures of all tests, and the order of the tests."""

import gc
import os
import re
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nexus.cli.main import main
from megatron_nexus.data.default_corpus import cache_folder
from megatron_nexus.log import logger

pytest.register_assert_rewrite("tests.support")

from tests.support.paths import TESTS  # noqa: E402
from tests.support.subprocesses import Spawn, spawner  # noqa: E402
from tests.support.verbs import CallVerb  # noqa: E402

# What tests compile runs for a few steps: by a compiler that does not optimise, and without vectors.
COMPILED = cache_folder("") / "test-extensions"
(COMPILED / "torch").mkdir(parents=True, exist_ok=True)
shutil.copy(TESTS / "support" / "extension.h", COMPILED / "torch")
os.environ["CXX"] = shutil.copy(TESTS / "support" / "unoptimized_g++", COMPILED)  # one path for all clones
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # a pool of processes would import torch again
os.environ["TORCH_EXTENSIONS_DIR"] = str(COMPILED)
gc.set_threshold(100_000)  # thousands of modules live here, none of them garbage
sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # hidden from DeepSpeed, as ranks hide it
DEFAULT_MARKS = "not law and not slow"
NOT_BY_DEFAULT = re.compile(r"^pytestmark = .*pytest\.mark\.(law|slow)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file of which no test is asked for: some import seconds of libraries."""
    asked, left_out = config.option.markexpr, False
    if collection_path.name.startswith("test_") and asked == DEFAULT_MARKS:
        left_out = NOT_BY_DEFAULT.search(collection_path.read_text()) is not None
    elif collection_path.name.startswith("test_") and asked == "torch_versions":
        left_out = asked not in collection_path.read_text()
    return left_out or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, then those of few tests: a long test that begins last leaves a core idle."""
    tests = Counter(item.path for item in items)
    long = {item.path for item in items if item.get_closest_marker("law") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in long, tests[item.path]))


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of later garbage collections, of which pytest makes some itself."""
    gc.freeze()


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """The package's console, to be set up by the test; afterwards the logger is what it was."""
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield capsys
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawn]:
    """Start a command in a folder, in a session of its own; at the end of the test nothing of it lives."""
    yield from spawner(tmp_path_factory.mktemp("logs"))


@pytest.fixture
def call_verb(monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]) -> Iterator[CallVerb]:
    """Run a verb of the command in this process; afterwards signals are handled as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(verb: str, words: str | list[object], started: str = "nexus") -> tuple[int, str]:
        given = shlex.split(words) if isinstance(words, str) else map(str, words)
        monkeypatch.setattr(sys, "argv", [started, *given])
        with pytest.raises(SystemExit) as ended:
            main(verb)
        printed = console.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)

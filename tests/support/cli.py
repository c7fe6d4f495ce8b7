"""The real command in a folder of its own: a model of 13,000 parameters on random tokens."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from tests.support.paths import REPOSITORY, TESTS
from tests.support.ports import free_port
from tests.support.subprocesses import WARM_PYTHON, Program, Spawn, spawner
from tests.support.waiting import wait_for
from tests.support.warm_programs import warm_bin

VOCABULARY = 97
PYTHON = [sys.executable]
WARM = [WARM_PYTHON]
DEEPSPEED, TORCHRUN = ([str(Path(sys.executable).with_name(name))] for name in ("deepspeed", "torchrun"))
SHARED_MEMORY = Path("/dev/shm")

SMALL = shlex.split(
    "--data-path corpus --split 8,2 --vocab-size 97 --num-layers 2 --hidden-size 16 --num-attention-heads 2 "
    "--kv-channels 8 --ffn-hidden-size 24 --nexus-m 20 --nexus-a 24 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 4 --lr-warmup-iters 2 --log-interval 1 --eval-interval 0 --eval-iters 1"
)
ENDLESS = 1_000_000


def warm_ranks(count: int) -> list[str]:
    """Return a launcher of `count` ranks that have done their imports."""
    return [WARM_PYTHON, str(TESTS / "support" / "warm_launcher.py"), str(count), str(free_port())]


def warm_deepspeed(*flags: str) -> list[str]:
    """Return DeepSpeed's command with all imports done; a process below finds no such parent of its own."""
    return [str(warm_bin() / "deepspeed"), *flags]


class Command:
    """Starts the command in a folder with a corpus and a link to the script, as a user would.

    Without a launcher it is one process that has done its imports, as have the local ranks that it starts.
    """

    def __init__(self, folder: Path, spawn: Spawn) -> None:
        self.folder = folder
        self._spawn = spawn

    def start(self, words: str, launcher: list[str] = WARM) -> Program:
        """Start the training script with the small model's flags and `words`."""
        return self._spawn([*launcher, "pretrain_nexus.py", *SMALL, *shlex.split(words)], self.folder)

    def run(self, words: str, launcher: list[str] = WARM) -> tuple[int, str]:
        """The exit code and all output of a run, which leaves no process behind."""
        return ended(self.start(words, launcher))

    def tool(self, name: str, words: str, python: list[str] = WARM) -> tuple[int, str]:
        """The exit code and all output of a file of tools/."""
        return run_tool(self._spawn, self.folder, name, words, python)

    def repeat(self, line: str) -> tuple[int, str]:
        """Run a command line that a run printed."""
        launcher, *words = shlex.split(line)
        programs = {"deepspeed": warm_deepspeed(), "torchrun": TORCHRUN, sys.executable: WARM}
        program = programs.get(launcher, [launcher])
        return ended(self._spawn([*program, *words], self.folder))

    def losses(self, folder: str) -> dict[int, float]:
        records = read_metrics(self.folder / folder / METRICS_FILE)
        return {int(record["step"]): record["loss"] for record in records if "loss" in record}


def run_tool(spawn: Spawn, folder: Path, name: str, words: str, python: list[str] = WARM) -> tuple[int, str]:
    """The exit code and all output of a file of tools/, which leaves no process behind."""
    program = spawn([*python, str(REPOSITORY / "tools" / name), *shlex.split(words)], folder)
    code = program.end()
    # A server of workers ends by itself once its tool is gone.
    wait_for(lambda: program.left() == {}, "the end of all processes")
    return code, program.output()


def ended(program: Program) -> tuple[int, str]:
    code = program.end()
    assert program.left() == {}, program.output()
    return code, program.output()


def summary(output: str, name: str) -> str:
    """An entry of the summary at the end of a run."""
    found = re.search(rf"^  {name} +(.*)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def assert_refused(code: int, output: str, kind: str, *expected: str) -> None:
    """A mistake of the user: code 2, one message that names all of `expected`, no traceback."""
    assert code == 2, output
    assert "Traceback" not in output
    assert len(re.findall(r"^\w+Error: ", output, re.MULTILINE)) == 1, output
    message = output[output.index(f"{kind}: ") :]
    assert all(part in message for part in expected), message


def commands(folder: Path, logs: Path) -> Iterator[Command]:
    """A command for the body of a fixture; after it nothing of its runs is in shared memory."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(60):
            writer.add_document(rng.integers(0, VOCABULARY, 100))
    (folder / "pretrain_nexus.py").symlink_to(REPOSITORY / "pretrain_nexus.py")
    before = set(SHARED_MEMORY.glob("deepspeed*"))
    for spawn in spawner(logs):
        yield Command(folder, spawn)
    assert set(SHARED_MEMORY.glob("deepspeed*")) <= before

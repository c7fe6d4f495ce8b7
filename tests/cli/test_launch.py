"""`nexus launch`: DeepSpeed's runner, from a virtual environment whose path holds a space."""

import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

import pytest

from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from tests.support.cli import ENDLESS, SMALL, Command, commands, ended, summary, warm_ranks
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nexus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command as pip installs it, in an environment of its own with the packages of this one."""
    environment = tmp_path_factory.mktemp("virtual environment") / "v env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (python,) = environment.glob("bin/python")
    (site,) = environment.glob("lib/python3*/site-packages")
    (site / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n{REPOSITORY}\n")
    # What pip calls for each entry point of a wheel.
    make = (
        "from pip._vendor.distlib.scripts import ScriptMaker\n"
        f"maker = ScriptMaker(None, {str(environment / 'bin')!r})\n"
        "maker.variants = {''}\n"
        "maker.make('nexus = megatron_nexus.cli.main:main')"
    )
    subprocess.run([python, "-c", make], check=True)
    return str(environment / "bin" / "nexus")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A folder with a corpus, which all runs of this file read."""
    yield from commands(tmp_path_factory.mktemp("launch"), tmp_path_factory.mktemp("logs"))


def test_it_starts_the_ranks_and_says_how_to_resume(command: Command, spawn: Spawn, nexus: str) -> None:
    launch = [nexus, "launch", "--num_gpus", "2", "train", "--tp", "2", "--save", "a"]
    code, output = ended(spawn([*launch, *SMALL, "--train-iters", "2"], command.folder))
    assert code == 0, output
    assert "mesh: tensor 2 x pipeline 1 x data 1" in output
    assert "finished after iteration 2" in output
    line = summary(output, "resume with")
    assert line.startswith("nexus launch --num_gpus 2 train --tp 2 --data-path corpus"), line
    words = shlex.split(line)
    resumed = [*warm_ranks(2), "pretrain_nexus.py", *words[words.index("train") + 1 :]]
    code, output = ended(spawn(resumed, command.folder))
    assert code == 0 and "finished after iteration 4" in output, output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num_gpus 2 train --tp 3", "--tp 3 does not divide"),
        ("--num_gpus 2 evaluate", "launch ... train"),
        ("--bogus train", "--bogus"),
    ],
)
def test_its_exit_code_is_that_of_the_run(
    words: str, expected: str, command: Command, spawn: Spawn, nexus: str
) -> None:
    code, output = ended(spawn([nexus, "launch", *words.split()], command.folder))
    assert code == 2 and expected in output and "Traceback" not in output, output


def test_ctrl_c_waits_until_the_ranks_have_saved(command: Command, spawn: Spawn, nexus: str) -> None:
    words = ["launch", "--num_gpus", "2", "train", "--save", "stopped", "--train-iters", str(ENDLESS)]
    program = spawn([nexus, *words, *SMALL], command.folder)
    wait_for(lambda: "iteration       3/" in program.output(), "the third step")
    program.interrupt()
    code = program.end()
    assert code != 0 and newest_checkpoint(command.folder / "stopped") is not None, program.output()
    assert "Traceback" not in program.output() and "saved stopped/" in program.output()
    assert program.left() == {}

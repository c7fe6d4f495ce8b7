"""`nexus launch`: DeepSpeed's runner, from a virtual environment whose path holds a space."""

import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

import pytest

from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from tests.support.cli import ENDLESS, SMALL, WARM, Command, commands, ended, summary
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.warm_programs import warm_bin

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nexus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command as pip installs it, in an environment of its own with the packages of this one."""
    environment = tmp_path_factory.mktemp("virtual environment") / "v env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (python,) = environment.glob("bin/python")
    (site,) = environment.glob("lib/python3*/site-packages")
    (site / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n{REPOSITORY}\n")
    quoted = f'"{python}"'
    # What pip calls for each entry point of a wheel.
    make = (
        "from pip._vendor.distlib.scripts import ScriptMaker\n"
        f"maker = ScriptMaker(None, {str(environment / 'bin')!r})\n"
        f"maker.executable = {quoted!r}\n"
        "maker.variants = {''}\n"
        "maker.make('nexus = megatron_nexus.cli.main:main')"
    )
    subprocess.run([sys.executable, "-c", make], check=True)
    return str(environment / "bin" / "nexus")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A folder with a corpus, which all runs of this file read."""
    yield from commands(tmp_path_factory.mktemp("launch"), tmp_path_factory.mktemp("logs"))


def test_it_starts_the_ranks_ends_when_they_have_saved_and_says_how_to_resume(
    command: Command, spawn: Spawn, nexus: str
) -> None:
    """With one rank: that two train together and end well, with code 0, is a law of tests/test_scripts.py."""
    launch = [nexus, "launch", "--num_gpus", "1", "train", "--save", "stopped"]
    program = spawn([*launch, *SMALL, "--train-iters", str(ENDLESS)], command.folder)
    program.wait_for_output("iteration       3/")
    program.interrupt()
    code, output = program.end(), program.output()
    assert code != 0 and newest_checkpoint(command.folder / "stopped") is not None, output
    assert "Traceback" not in output and "saved stopped/" in output
    assert program.left() == {}
    assert "mesh: tensor 1 x pipeline 1 x data 1" in output
    line = summary(output, "resume with")
    assert line.startswith("nexus launch --num_gpus 1 train --data-path corpus"), line
    (step,) = re.findall(r"stopped after iteration (\d+)", output)
    words = shlex.split(line.replace(f"--train-iters {ENDLESS}", f"--train-iters {int(step) + 1}"))
    resumed = [*WARM, "pretrain_nexus.py", *words[words.index("train") + 1 :]]
    code, output = ended(spawn(resumed, command.folder))
    assert code == 0 and f"finished after iteration {int(step) + 1}" in output, output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num_gpus 2 train --tp 3", "--tp 3 does not divide"),
        ("--num_gpus 2 evaluate", "launch ... train"),
        ("--bogus train", "--bogus"),
    ],
)
def test_its_exit_code_is_that_of_the_run(words: str, expected: str, command: Command, spawn: Spawn) -> None:
    code, output = ended(spawn([str(warm_bin() / "nexus"), "launch", *words.split()], command.folder))
    assert code == 2 and expected in output and "Traceback" not in output, output

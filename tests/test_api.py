"""The Python API does what the commands do, to the bit, and answers mistakes by their exceptions."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nexus import api
from megatron_nexus.errors import CheckpointError, ConfigError, DataError, TrainingError
from tests.support.cases import first_by_default
from tests.support.cli import SMALL, Command, commands, run_tool, warm_ranks
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.waiting import wait_for
from tests.support.warm_programs import warm_bin

# The small model's flags as settings.
SETTINGS = {
    word.removeprefix("--").replace("-", "_"): SMALL[i + 1]
    for i, word in enumerate(SMALL)
    if word.startswith("--")
}


@pytest.fixture
def command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    yield from commands(tmp_path, tmp_path_factory.mktemp("logs"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the processes of `api` start with all imports done."""
    monkeypatch.setattr(sys, "executable", str(warm_bin() / "python"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_it_trains_grows_and_trains_on_as_the_commands_do(
    command: Command, spawn: Spawn, folder: Path, warm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    made = api.train(save="api", pp=2, train_iters=3, **SETTINGS)
    assert "finished after iteration 3" in capsys.readouterr().out
    code, output = command.run("--save command --pp 2 --train-iters 3", warm_ranks(2))
    assert code == 0, output
    assert list(made.losses) == [1, 2, 3]
    assert made.losses == command.losses("command")
    assert made.checkpoint == Path("api/iter_0000003")
    assert 3 in made.validation_losses

    grown = api.grow(load=made.folder, save="api-grown", nexus_m=24, nexus_a=28, tp=2, verify=True)
    words = "--load api --save tool-grown --nexus-m 24 --nexus-a 28 --tp 2 --verify"
    code, output = run_tool(spawn, folder, "grow_sharded_checkpoint.py", words)
    assert code == 0, output
    assert grown == Path("api-grown/iter_0000003")
    assert contents(grown) == contents(Path("tool-grown/iter_0000003"))

    more = api.train(save="api-grown", load="api-grown", echo=False, train_iters=4, eval_iters=1)
    assert capsys.readouterr().out.count("finished") == 0
    assert list(more.losses) == [4]
    assert api.open_run("api-grown") == more
    with pytest.raises(ConfigError, match=r"--save api-grown holds iter_0000004.*give another folder"):
        api.grow(load="api", save="api-grown", nexus_m=24)
    with pytest.raises(ConfigError, match=r"--nexus-m 10 .*20"):
        api.grow(load="api", save="smaller", nexus_m=10)
    with pytest.raises(DataError, match="--tokenizer-model"):
        api.load("api")  # of token files without a tokenizer

    with pytest.raises(TrainingError, match=r"step 1: loss.*lower --lr|lower --lr") as raised:
        api.train(
            save="lost", echo=False, lr=1e30, clip_grad=0, train_iters=4, **SETTINGS | {"lr_warmup_iters": 0}
        )
    assert "Traceback" not in str(raised.value)
    with pytest.raises(DataError, match=r"nowhere\.idx does not exist"):
        api.train(save="lost", echo=False, **SETTINGS | {"data_path": "nowhere"})


@pytest.mark.slow
def test_ctrl_c_has_the_run_save(command: Command, folder: Path, warm: None) -> None:
    def interrupt() -> None:
        metrics = folder / "stopped" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') > 1, "two steps")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # Ignored where the tests run in the background, and in the processes of pytest-xdist.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            api.train(save="stopped", echo=False, train_iters=1_000_000, **SETTINGS)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(api.open_run("stopped").losses) > 1


def test_a_second_ctrl_c_ends_a_command_that_does_not_heed_the_first() -> None:
    """As ranks that wait within a collective."""
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)

    def interrupt() -> None:
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
        lines = api._lines(process)
        assert next(lines) == "up\n"
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            next(lines)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
        process.kill()
    assert process.wait() == -signal.SIGTERM


def test_a_configuration_is_that_of_the_command() -> None:
    config = api.configure(
        preset="nexusformer-240m", tp=2, bf16=True, data_path=["0.7", "web", "0.3", "code"]
    )
    assert config.parallel.tensor_model_parallel_size == 2 and config.training.precision == "bf16"
    assert config.data.data_path == ("0.7", "web", "0.3", "code")
    assert api.configure(sequence_parallel=False).parallel.sequence_parallel is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nexus_mm": 3}, "unknown flag --nexus-mm.*did you mean --nexus-m"),
        ({"lr": "fast"}, "--lr"),
        ({"tp": 3}, "--tp 3 does not divide"),
        ({"help": True}, "help only prints"),
        ({"dry_run": True}, "dry_run only prints"),
        ({"grow": "nexus_m=3"}, "needs a checkpoint to grow"),
    ],
    ids=str,
)
def test_a_mistake_is_an_exception(settings: dict[str, api.Setting], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        api.configure(**settings)


def test_what_is_not_there_is_an_exception(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        api.load("nowhere")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        api.grow(load="nowhere", save="new", nexus_m=9)
    with pytest.raises(ConfigError, match=r"--precision: .*fp8.*fp32.*bf16"):
        api.load("nowhere", precision="fp8")
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        api.unlearn("nowhere", "new", "forget.jsonl", lr=1e-5, train_iters=1)
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        api.retrieve("nowhere", "corpus.jsonl", "q.jsonl", forget=1, retain=1, sketch_size=64)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("platform", first_by_default(1, ["darwin", "win32"]))
def test_another_system_is_answered_before_imports_fail(platform: str) -> None:
    """The modules that only Linux has are missing there; a command ends with one message."""
    away = f"import sys; sys.platform = {platform!r}; sys.modules['fcntl'] = None\n"
    command = [
        sys.executable,
        "-c",
        f"{away}import runpy; runpy.run_module('megatron_nexus', run_name='__main__')",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"runs on Linux, and this is {platform}: use a Linux machine, WSL 2" in done.stderr
    program = f"{away}from megatron_nexus import api\napi.load('runs/a')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ConfigError" in done.stderr.splitlines()[-2] and platform in done.stderr

"""Runs that save to an object store and load from it: a real S3 server in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_nexus.checkpoint import location
from megatron_nexus.checkpoint.location import ObjectPath
from megatron_nexus.checkpoint.run_dir import complete_checkpoints, find_checkpoint, newest_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.shard import Box
from tests.support.cli import ENDLESS, Command, assert_refused, commands, summary, warm_ranks
from tests.support.ports import free_port
from tests.support.waiting import TIMEOUT_S, wait_for

pytest.importorskip("s3fs", reason="requirements-dev.txt has it")
pytest.importorskip("moto", reason="requirements-dev.txt has it")
pytestmark = pytest.mark.slow

SERVER = """
import signal
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(port={port}, verbose=False)
server.start()
signal.sigwait([signal.SIGTERM])
server.stop()
"""
ROOT = ObjectPath("s3://bucket/runs/a")
SAVE = "--save s3://bucket/runs/a --load auto --save-interval 1 --keep-latest 2"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """An empty bucket on a server of this machine."""
    port = free_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        running = subprocess.Popen(
            [sys.executable, "-c", SERVER.format(port=port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def bucket_is_made() -> bool:
            try:
                location.file_system("s3").mkdir("bucket")
            except OSError:
                return False
            return True

        wait_for(bucket_is_made, "the server's bucket")
        yield
        running.send_signal(signal.SIGTERM)
        running.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """All runs of this file."""
    yield from commands(tmp_path_factory.mktemp("object-store"), tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def killed(command: Command) -> int:
    """A run on two ranks that was killed amid its saves: the last step that it had reported saved."""
    program = command.start(f"{SAVE} --pp 2 --async-save --train-iters {ENDLESS}", warm_ranks(2))
    wait_for(lambda: program.output().count("\nsaved s3://bucket/runs/a/iter_") > 1, "saves")
    for pid in program.left():
        os.kill(pid, signal.SIGKILL)
    program.end()
    print(program.output())
    return max(
        map(int, re.findall(r"^saved s3://bucket/runs/a/iter_(\d+) in", program.output(), re.MULTILINE))
    )


def test_a_killed_run_resumes_on_another_topology_and_loses_nothing(command: Command, killed: int) -> None:
    newest = find_checkpoint(ROOT)
    step = int(newest.name[5:])
    assert step >= killed
    code, output = command.run(f"{SAVE} --train-iters {step + 2}")
    assert code == 0, output
    assert f"resumed {newest} at iteration {step}," in output
    assert summary(output, "checkpoint") == str(ROOT / f"iter_{step + 2:07d}")
    assert newest_checkpoint(ROOT) == ROOT / f"iter_{step + 2:07d}"
    assert sorted(complete_checkpoints(ROOT)) == [step + 1, step + 2], "older ones are gone"
    # On one rank it is read from another's pieces, and the run's own files lie on this disk.
    assert step + 2 in command.losses("runs/bucket-runs-a")
    CheckpointReader(newest_checkpoint(ROOT)).verify()


def test_only_the_bytes_that_are_needed_are_fetched(
    command: Command, killed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CheckpointReader(find_checkpoint(ROOT))
    fetched: list[int] = []
    read_range = ObjectPath.read_range

    def count(path: ObjectPath, start: int | None, stop: int | None) -> bytes:
        contents = read_range(path, start, stop)
        fetched.append(len(contents))
        return contents

    monkeypatch.setattr(ObjectPath, "read_range", count)
    name, spec = next((n, s) for n, s in reader.manifest.specs.items() if len(s.shape) == 2)
    reader.read_box(name, "fp32", Box((0, 0), spec.shape))  # and the header of the data file, once
    fetched.clear()
    reader.read_box(name, "fp32", Box((0, 0), spec.shape))
    assert sum(fetched) == 4 * spec.shape[0] * spec.shape[1]


def test_damage_and_absence_are_named(command: Command, killed: int) -> None:
    newest = find_checkpoint(ROOT)
    data = newest / "rank_00000.safetensors"
    whole = data.read_bytes()
    with data.named_in_errors():
        data.store.pipe_file(data.key, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{data}: .* is damaged"):
        CheckpointReader(newest).verify()
    data.unlink()
    with pytest.raises(CheckpointError, match=rf"{newest.name} \(without rank_00000.safetensors\)"):
        find_checkpoint(ROOT / "iter_0000000")
    older = newest_checkpoint(ROOT)
    assert older is not None and older != newest
    CheckpointReader(older).verify()
    (newest / "manifest.json").unlink()
    assert newest_checkpoint(ROOT) == older


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        (
            "--load s3://bucket/nowhere",
            "CheckpointError",
            ["s3://bucket/nowhere: no such folder", "s3://bucket holds"],
        ),
        ("--save s3://no-such-bucket/run", "CheckpointError", ["s3://no-such-bucket/run"]),
        ("--save nope://bucket/run", "ConfigError", ["nope://"]),
    ],
)
def test_what_cannot_be_reached_is_answered_with_one_message(
    command: Command, words: str, kind: str, expected: list[str]
) -> None:
    assert_refused(*command.run(f"{words} --train-iters 1"), kind, *expected)

"""The command that writes a checkpoint for others; what DeepSpeed makes of it: test_universal_checkpoint."""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_nexus.interchange import safetensors_writer
from tests.support import checkpoints
from tests.support.cases import first_by_default
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.verbs import CallVerb
from tests.support.waiting import wait_for

TOOL = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py")]
Run = Callable[[str], tuple[int, str]]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run."""
    root = tmp_path_factory.mktemp("old")
    checkpoints.write_checkpoint(root, checkpoints.configure(), tp=2)
    return root


@pytest.fixture
def folder(old: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of a run in `old`."""
    shutil.copytree(old, tmp_path / "old")
    (tmp_path / "names.json").write_text('{"head.weight": "lm_head.weight"}')
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, call_verb: CallVerb) -> Run:
    """Run the verb in `folder`: its exit code, what it printed."""
    monkeypatch.chdir(folder)
    return lambda words: call_verb("convert", words)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("block", first_by_default(1, [17, safetensors_writer.BLOCK_ELEMENTS]))
def test_a_plain_file_holds_every_tensor_by_its_logical_name(
    block: int, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_writer, "BLOCK_ELEMENTS", block)
    before = contents(folder / "old")
    code, output = run("--load old --save new --moments")
    assert code == 0, output
    for state, file in (("fp32", "model"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        found = load_file(folder / "new" / f"{file}.safetensors")
        expected = checkpoints.tensors(folder / "old" / "iter_0000040", state)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], torch.from_numpy(values)) for name, values in expected.items())
    assert contents(folder / "old") == before
    assert sorted(path.name for path in folder.iterdir()) == ["names.json", "new", "old"]


def test_bf16_is_the_nearest_and_the_header_tells_the_model(run: Run, folder: Path) -> None:
    code, output = run("--load old/iter_0000040 --save deep/er/new --dtype bf16 --names names.json")
    assert code == 0, output
    path = folder / "deep" / "er" / "new" / "model.safetensors"
    found = load_file(path)
    assert "head.weight" not in found
    expected = checkpoints.tensors(folder / "old" / "iter_0000040")
    for name, values in expected.items():
        theirs = "lm_head.weight" if name == "head.weight" else name
        assert torch.equal(found[theirs], torch.from_numpy(values).to(torch.bfloat16))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["model"])["nexus_m"] == checkpoints.SIZES["nexus_m"]
    assert metadata["step"] == "40"
    assert metadata["format"] == "pt"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--load nowhere --save new", ["nowhere: no such folder"]),
        ("--load old --save old", ["old holds files", "nothing is ever overwritten"]),
        ("--load old --save names.json", ["names.json is a file"]),
        ("--load old --save names.json/new", ["names.json/new: Not a directory"]),
        ("--load old --save /proc/new", ["/proc/new: ", "can be written"]),
        ("--load old --save old/iter_0000040/new", ["lies in the source"]),
        ("--load old --save s3://bucket/new", ["--save s3://bucket/new is not a folder"]),
        ("--load old --save new --format universal --moments", ["both moments, always"]),
        ("--load old --save new --format universal --dtype bf16", ["both moments, always"]),
        ("--load old --save new --dtype fp16", ["--dtype", "'fp16'"]),
        ("--load old --save new --shards 3", ["--shards"]),
        ("--load old", ["--save"]),
        ("--load old --save new --names missing.json", ["--names missing.json: No such file"]),
        ("--load old --save new --names old/latest", ["is not JSON"]),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    words: str, expected: list[str], run: Run, folder: Path
) -> None:
    before = contents(folder)
    code, output = run(words)
    assert code == 2, output
    assert all(part in output for part in expected), output
    assert "Traceback" not in output
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["names.json", "old"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["head.weight"], "is not a JSON object"),
        ({"heat.weight": "x"}, "'heat.weight', which is not a parameter"),
        ({"head.weight": "../x"}, "without slashes"),
        ({"head.weight": 3}, "without slashes"),
        ({"head.weight": "embedding.weight"}, "calls embedding.weight and head.weight"),
    ],
)
def test_wrong_names_are_refused(names: object, expected: str, run: Run, folder: Path) -> None:
    (folder / "names.json").write_text(json.dumps(names))
    code, output = run("--load old --save new --format universal --names names.json")
    assert code == 2, output
    assert expected in output


@pytest.mark.parametrize("kind", ["safetensors", "universal"])
def test_a_damaged_source_is_named_and_nothing_is_left(kind: str, run: Run, folder: Path) -> None:
    data = folder / "old" / "iter_0000040" / "rank_00001.safetensors"
    damaged = bytearray(data.read_bytes())
    damaged[-9] ^= 1
    data.write_bytes(damaged)
    code, output = run(f"--load old --save new --format {kind} {'--moments' * (kind == 'safetensors')}")
    assert code == 2
    assert "rank_00001.safetensors" in output and "damaged" in output
    assert sorted(path.name for path in folder.iterdir()) == ["names.json", "old"]


def test_a_full_disk_is_told_before_anything_is_written(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    code, output = run("--load old --save new")
    assert code == 2
    assert "the disk has 0.00 MB" in output
    assert not (folder / "new").exists() and not (folder / ".tmp_new").exists()


def test_what_a_killed_conversion_left_is_cleared_and_two_at_once_are_told(run: Run, folder: Path) -> None:
    left = folder / ".tmp_new" / "global_step40"
    left.mkdir(parents=True)
    (folder / ".tmp_new" / "model.safetensors").write_bytes(b"half")
    descriptor = os.open(folder / ".tmp_new", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, output = run("--load old --save new")
    assert code == 2 and "is being written by another process" in output
    assert left.is_dir()
    os.close(descriptor)
    code, output = run("--load old --save new")
    assert code == 0, output
    assert [path.name for path in (folder / "new").iterdir()] == ["model.safetensors"]
    assert not (folder / ".tmp_new").exists()


@pytest.mark.slow
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, spawn: Spawn) -> None:
    config = checkpoints.configure(nexus_m=600, nexus_a=700)
    checkpoints.write_checkpoint(tmp_path / "old", config, chunk_elements=1 << 24)
    words = "--load old --save new --format universal"
    converting = spawn([*TOOL, *words.split()], tmp_path)
    wait_for(lambda: any(tmp_path.glob(".tmp_new/*/zero/*")), "the conversion begins")
    converting.process.terminate()
    code = converting.end()
    names = sorted(path.name for path in tmp_path.iterdir())
    # It may have been quicker than the signal.
    assert (code, names) in [(130, ["old"]), (0, ["new", "old"])], converting.output()

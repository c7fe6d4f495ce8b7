"""The growth tool as a user runs it: what it tells, what it refuses, and what it leaves behind."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.base.durable import naming_errors
from megatron_nexus.checkpoint.data_file import write_at
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.run_dir import find_checkpoint, run_dir_lock
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.config.schedule import learning_rate
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_nexus.growth.worker_group import os_error_message
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from tests.support import checkpoints
from tests.support.cases import first_by_default
from tests.support.cli import WARM
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn
from tests.support.verbs import CallVerb
from tests.support.waiting import wait_for

TOOL = [sys.executable, str(REPOSITORY / "tools" / "grow_sharded_checkpoint.py")]
Run = Callable[[str], tuple[int, str]]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run."""
    root = tmp_path_factory.mktemp("old")
    checkpoints.write_checkpoint(root, checkpoints.configure(nexus_inner_norm=True), tp=2)
    return root


@pytest.fixture
def folder(old: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of a run in `old`."""
    shutil.copytree(old, tmp_path / "old")
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, call_verb: CallVerb) -> Run:
    """Run the verb in `folder`: its exit code, what it printed."""
    monkeypatch.chdir(folder)
    return lambda words: call_verb("grow", words, "tools/grow_sharded_checkpoint.py")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_grows_verifies_and_says_how_to_go_on(run: Run, folder: Path) -> None:
    before = contents(folder / "old")
    code, printed = run(
        "--load old --save new --nexus-m 20 --num-layers 3 --depth-init copy --vocab-size 40 --pp 2 --verify"
    )
    assert code == 0, printed
    # The inner norm would see what `in_rand` makes.
    assert "new units                out_rand" in printed
    assert "new layers               copy, interleaved" in printed
    assert "nexus_m                  15 -> 20" in printed
    assert "verified in float64: logits moved by at most" in printed
    assert "new tokens raise the loss by" in printed
    assert "deepspeed --num_gpus 2 pretrain_nexus.py --tp 1 --pp 2 --load new" in printed
    assert contents(folder / "old") == before
    manifest = read_manifest(find_checkpoint(folder / "new"))
    assert manifest.lineage[-1]["verification"]["largest_error"] <= 1e-12
    assert manifest.topology.pipe_size == 2
    assert manifest.progress.step == checkpoints.STEP


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--nexus-m 20 --init noise", "--init noise"),
        ("--num-layers 4", "--depth-init stack"),
    ],
)
def test_a_function_that_changed_is_not_called_verified(words: str, flag: str, run: Run) -> None:
    code, printed = run(f"--load old --save new {words} --verify")
    assert code == 0, printed
    assert f"{flag} changes the function" in printed
    assert f"the function changed, as {flag} does: in float64 logits moved by at most" in printed
    assert "verified" not in printed
    assert ("--depth-init copy keeps it" in printed) == (flag == "--depth-init stack")


@pytest.mark.parametrize(
    ("options", "steps", "lost"),
    [
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "train_iters": 60}, (20, 40), None),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "train_iters": 59},
            (20, 40),
            "iter_0000020",
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 80, "train_iters": 59},
            (40,),
            "--lr-decay-style WSD",
        ),
        ({"train_iters": 60}, (20, 40), "--lr-decay-style WSD"),
        ({"lr_decay_style": "constant"}, (40,), None),
    ],
)
def test_growing_a_decayed_run_says_what_it_costs_and_what_to_grow(
    options: dict, steps: tuple[int, ...], lost: str | None, run: Run, folder: Path
) -> None:
    config = checkpoints.configure(**options)
    for step in steps:
        checkpoints.write_checkpoint(folder / "decayed", config, step=step)
    code, output = run("--load decayed --nexus-m 20 --dry-run")
    assert code == 0, output
    assert ("0.08 nats" in output) == (lost is not None), output
    assert lost is None or lost in output.split("0.08 nats")[1].split(" docs/")[0]


@pytest.mark.parametrize("unit", first_by_default(1, ["samples", "iters"]))
def test_a_growth_in_the_stable_phase_keeps_the_schedule_of_the_run(
    unit: str, folder: Path, run: Run
) -> None:
    """With the flags of docs/growth.md: the base ends before its decay, the grown run goes on to its end."""
    size = {"iters": 1, "samples": 4}[unit]
    schedule = {f"lr_warmup_{unit}": 10, f"lr_decay_{unit}": 100, f"lr_wsd_decay_{unit}": 20}
    flags = {"lr_decay_style": "WSD", **{name: size * n for name, n in schedule.items()}, "train_iters": 40}
    base = checkpoints.configure(**flags)
    checkpoints.write_checkpoint(folder / "base", base)

    def rates(config: RunConfig, steps: range) -> list[float]:
        return [learning_rate(config.optimizer, size * step, size * 100) for step in steps]

    code, output = run("--load base --save grown --num-layers 4")
    assert code == 0 and "warning" not in output, output
    assert "--load grown --train-iters 100" in output
    for words in (
        "--load grown --train-iters 100",
        "--load base --train-iters 100 --save b --grow num_layers=4",
        "--load base --train-samples 400 --save b --grow num_layers=4 --lr-decay-style WSD",
    ):
        config = read_train_command(words.split()).config
        assert config.training.train_iters == 100 and config.model.num_layers == 4
        assert rates(config, range(41, 101)) == rates(base, range(41, 101))
    assert rates(base, range(41, 81)) == [base.optimizer.lr] * 40
    assert rates(base, range(100, 101)) == [base.optimizer.min_lr]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("most", first_by_default(1, [20_000, 3_000]))
def test_a_disk_that_is_full_is_told_with_the_file_and_a_remedy(
    run: Run, folder: Path, workers: int, most: int
) -> None:
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))  # to the system a disk of files so small
    try:
        code, printed = run(f"--load old --save new --nexus-m 20 --workers {workers}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2, printed
    assert "/rank_00000.safetensors: File too large: make room, or save to another disk" in printed
    assert "Errno" not in printed
    assert contents(folder) == before


def test_the_file_is_named_where_a_piece_does_not_fit() -> None:
    with pytest.raises(OSError) as caught, naming_errors(Path("run/rank_00000.safetensors")):
        descriptor = os.open("/dev/full", os.O_WRONLY)
        try:
            write_at(descriptor, memoryview(b"chunk"), 0)
        finally:
            os.close(descriptor)
    assert os_error_message(caught.value) == (
        "run/rank_00000.safetensors: No space left on device: make room, or save to another disk"
    )


def test_a_dry_run_tells_all_and_writes_nothing(run: Run, folder: Path) -> None:
    code, printed = run("--load old --preset nexusformer-tiny --init zero --tp 2 --dry-run")
    assert code == 0, printed
    assert "no gradient will ever reach the new blocks" in printed
    assert "head.weight" in printed and "4096 x 128" in printed
    assert "layers.0.attention.q.w_m" in printed and "kept 180, zero 20,300" in printed
    assert "training FLOPs per token" in printed
    assert [path.name for path in folder.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--nexus-m 14", ["--nexus-m 14 is below the checkpoint's 15", "never shrinks"]),
        ("--nexus-m 15", ["nexus_m 15: the checkpoint has these sizes already"]),
        ("--nexus-m 20 --depth-init copy", ["--depth-init copy", "2: give a larger --num-layers"]),
        ("--moments reset", ["--moments reset", "no size is given"]),
        ("--kv-channels 6 --num-attention-heads 1", ["--num-attention-heads 1 is below", "never shrinks"]),
        ("--num-attention-heads 3 --tp 2", ["--tp 2 does not divide --num-attention-heads 3: use 1, 3"]),
        ("--init in_rand --nexus-a 30", ["inner norm", "use --init out_rand"]),
        (
            "--nexus-a 30 --init-std=-1 --noise-share 0",
            ["2 problems", "--init-std -1.0", "--noise-share 0.0"],
        ),
        (
            "--pattention-slots 9",
            ["--pattention-slots 9 is for --projection pattention", "has --projection nexus: drop the flag"],
        ),
        (
            "--nexus-a 30 --init-std nan --noise-share nan",
            ["2 problems", "--init-std nan", "--noise-share nan"],
        ),
        ("--nexus-a 30 --init-std inf", ["--init-std inf"]),
        ("--nexus-a many", ["--nexus-a", "'many'"]),
        ("--rotary-base 5", ["--rotary-base"]),
        ("--pp 5", ["--pp 5 is more than --num-layers 2"]),
        ("--workers 0", ["--workers 0 must be positive"]),
        ("--save old/latest", ["--save old/latest is a file"]),
        ("--save /proc/new --nexus-m 20", ["--save /proc/new: No such file", "that can be written"]),
        ("--save old --dry-run", ["--save old holds iter_0000040", "never overwritten"]),
        ("--nexus-m 10000000000", [" needs ", " and the disk has ", "make room"]),
        ("--save old", ["--save old holds iter_0000040", "never overwritten"]),
        ("--save old/iter_0000040/new", ["lies in the source"]),
        ("--load nowhere", ["nowhere: no such folder"]),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    words: str, expected: list[str], run: Run, folder: Path
) -> None:
    before = contents(folder)
    code, output = run(f"--load old --save new {words}")
    assert code == 2, output
    assert all(part in output for part in expected), output
    assert "Traceback" not in output
    assert "importing torch" not in output or "the disk has" in output or "can be written" in output
    assert contents(folder) == before
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_two_at_once_are_told_and_neither_harms_the_other(run: Run, folder: Path) -> None:
    with run_dir_lock(folder / "new"):
        code, output = run("--load old --save new --nexus-m 20")
        assert code == 2
        assert "--save new is in use by process" in output
        assert [path.name for path in (folder / "new").iterdir()] == [".lock"]
    code, output = run("--load old --save new --nexus-m 20 --workers 20")
    assert code == 0, output
    assert sorted(path.name for path in (folder / "new").iterdir()) == ["iter_0000040", "latest"]


def test_a_damaged_source_is_named_and_nothing_is_left(run: Run, folder: Path) -> None:
    data = folder / "old" / "iter_0000040" / "rank_00001.safetensors"
    damaged = bytearray(data.read_bytes())
    damaged[-9] ^= 1
    data.write_bytes(damaged)
    for workers in (1, 2):
        code, output = run(f"--load old --save new --nexus-m 20 --workers {workers}")
        assert code == 2
        assert "rank_00001.safetensors" in output and "damaged" in output
        assert not (folder / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_growth_leaves_nothing(workers: int, folder: Path, spawn: Spawn) -> None:
    # Thousands of new blocks, all drawn: a few seconds.
    words = f"--load old --save new --num-layers 900 --nexus-m 90 --nexus-a 99 --workers {workers}"
    growing = spawn([*TOOL, *words.split()], folder)
    wait_for(lambda: any((folder / "new").glob(".tmp_*/rank_00000.safetensors")), "the growth begins")
    growing.process.terminate()
    assert growing.end() == 130, growing.output()
    assert "interrupted" in growing.output()
    wait_for(lambda: not growing.left(), "its workers end")
    assert not (folder / "new").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun is installed")
def test_the_ranks_of_mpirun_write_what_one_process_writes(run: Run, folder: Path) -> None:
    words = "--load old --nexus-m 20 --hidden-size 14 --tp 2"
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    done = subprocess.run(
        [*mpirun, *TOOL, *words.split(), "--save", "by-two"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(f"{words} --save by-one")[0] == 0
    one, two = (contents(folder / name) for name in ("by-one", "by-two"))
    assert list(one.values()) == list(two.values())


@pytest.mark.slow
def test_training_can_begin_grown_and_with_a_new_optimizer(tmp_path: Path, spawn: Spawn) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", token_dtype(37)) as writer:
        for document in np.random.default_rng(3).integers(0, 37, size=(40, 50)):
            writer.add_document(document)
    config = checkpoints.configure(seq_length=12, precision="fp32", lr=1e-3)
    before = contents(checkpoints.write_checkpoint(tmp_path / "old", config))
    words = "--data-path corpus --split 8,2 --eval-iters 1 --train-iters 42 --load old --reset-optimizer"
    new_lr = "--lr-decay-iters 44 --new-lr-ratio 1.5 --new-lr-warmup-iters 8"
    pretrain = [*WARM, str(REPOSITORY / "pretrain_nexus.py"), *words.split(), *new_lr.split()]
    grown = [*pretrain, "--grow", "nexus_m=20 num_layers=3 init=in_rand", "--save", "new"]
    training = spawn(grown, tmp_path)
    assert training.end() == 0, training.output()
    manifest = read_manifest(find_checkpoint(tmp_path / "new"))
    assert manifest.progress.step == 42
    assert manifest.optimizer.step_count == 2
    assert manifest.optimizer.grown_regions == ()
    assert manifest.lineage[-1]["settings"]["init"] == "in_rand"
    assert manifest.specs["layers.2.attention.q.w_m"].shape == (20, 12)
    assert "resume with" in training.output() and "--grow" not in training.output().split("resume with")[1]
    # A requeued job starts the same command again: it goes on, and neither grows nor resets a second time.
    requeued = spawn([*grown, "--train-iters", "44"], tmp_path)
    assert requeued.end() == 0, requeued.output()
    manifest = read_manifest(find_checkpoint(tmp_path / "new"))
    assert (manifest.progress.step, manifest.optimizer.step_count, len(manifest.lineage)) == (44, 4, 1)
    said = "weights of the last growth, {} steps ago, train at 1.5 x the learning rate"
    assert said.format(0) in training.output() and said.format(2) in requeued.output()
    # What was stopped in the warm-up of the new weights ends as what was not, and as what was measured.
    measured = ["--growth-metrics-interval", "2"]
    whole = spawn([*grown, "--save", "whole", "--train-iters", "44", *measured], tmp_path)
    assert whole.end() == 0, whole.output()
    records = read_metrics(tmp_path / "whole" / METRICS_FILE)
    found = {record["step"]: record["growth_metrics"] for record in records if "growth_metrics" in record}
    assert [*found] == [42, 44] and found[44]["layers.0.attention.q.w_m"]["elements_new"] == 5 * 12
    assert "elements_old" not in found[44]["layers.2.attention.q.w_m"]
    ended, expected = (checkpoints.tensors(find_checkpoint(tmp_path / name)) for name in ("new", "whole"))
    assert all(np.array_equal(ended[name], values) for name, values in expected.items())
    other = spawn([*pretrain, "--grow", "nexus_m=22", "--save", "new"], tmp_path)
    assert other.end() == 2 and "another --save" in other.output()
    assert contents(tmp_path / "old" / "iter_0000040") == before

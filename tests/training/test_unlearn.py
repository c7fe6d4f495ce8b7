"""Laws of `nexus unlearn`: every topology is one process, stopping and going on is never having stopped.

Runs the command's own `run` on a small model, and compares losses, scores, weights and moments.
"""

import json
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.cli.main import main
from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.cli.unlearn_start import check_not_unlearned
from megatron_nexus.errors import ConfigError
from tests.support import checkpoints
from tests.support.cli import assert_refused
from tests.support.eval_model import PIECES, write_tokenizer
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks
from tests.support.waiting import scaled_by_load
from tests.training.test_resume import _losses as losses_of
from tests.training.test_resume import _state as state_of

FORGET = ["She opens the door", "A boy sees the river", "Nobody paints the answer"]
RETAIN = ["The old man forgets the door", "She paints the river", "A boy opens the answer", "Nobody sees"]
COMMON = "--lr 3e-3 --fp32 --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --eval-interval 3"
LOSSES = {
    "npo-klr": "--loss npo --retain-loss klr --retain-weight 0.7",
    "simnpo-gdr": "--loss simnpo --simnpo-beta 0.3 --simnpo-gamma 0.1",
    "ga": "--loss ga --retain-loss none",
}
TOPOLOGIES = {
    "tp2": "--tp 2 --sequence-parallel",
    "pp2": "--pp 2",
    "zero1": "--zero-stage 1",
    "zero3": "--zero-stage 3",
}
STOPPED = ("tp2", "zero3")
SCORES = ("forget_nll", "retain_nll", "forget_Q_A_Prob", "retain_exact_memorization")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlearn")
    own = {
        "vocab_size": PIECES + 16,
        "num_attention_heads": 4,
        "tokenizer_model": str(write_tokenizer(folder)),
    }
    # As four ranks write it: a topology that none of the runs has.
    checkpoints.write_checkpoint(folder / "base", checkpoints.configure(**own, seq_length=32), tp=4)
    for name, texts in {"forget": FORGET, "retain": RETAIN}.items():
        lines = [
            json.dumps({"prompt": text, "answer": f" {end} at night."})
            for text, end in zip(texts, ("why", "in the garden", "", "it was"), strict=False)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def words(folder: Path, save: str, loss: str, flags: str, train_iters: int) -> list[str]:
    retain = [] if "none" in LOSSES[loss] else ["--retain", str(folder / "retain.jsonl")]
    where = ["--load", str(folder / "base"), "--save", str(folder / save)]
    own = [*COMMON.split(), *LOSSES[loss].split(), *flags.split(), "--train-iters", str(train_iters)]
    return ["unlearn", *where, "--forget", str(folder / "forget.jsonl"), *retain, *own]


def run(ranks: int, folder: Path, cases: list[list[str]]) -> None:
    (folder / f"cases_{ranks}.json").write_text(json.dumps(cases))
    run_ranks(ranks, TESTS / "training" / "resume_worker.py", str(folder / f"cases_{ranks}.json"))


def same_state(one: Path, other: Path) -> bool:
    first, second = (state_of(path / "iter_0000006") for path in (one, other))
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.law
def test_every_topology_is_one_process_and_stopping_is_never_having_stopped(folder: Path) -> None:
    cases = []
    for name, flags in TOPOLOGIES.items():
        loss = "simnpo-gdr" if name == "zero1" else "npo-klr"
        cases.append(words(folder, f"{name}-once", loss, flags, 6))
        if name in STOPPED:  # and started again by the same command
            cases += [words(folder, f"{name}-twice", loss, flags, steps) for steps in (3, 6)]
    run(2, folder, cases)
    # What two ranks have begun, their reference model's numbers included, one goes on with.
    moved = folder / "moved"
    shutil.copytree(folder / "tp2-twice", moved)
    shutil.rmtree(moved / "iter_0000006")
    alone = [words(folder, loss, loss, "", 6) for loss in LOSSES]
    killed = words(folder, "killed", "npo-klr", "--save-interval 2", 6)
    with pytest.raises(AssertionError, match=rf"exit codes \[-{signal.SIGKILL.value}\]"):
        run(1, folder, [[*killed, "--inject", "rank_killed@5"]])
    run(1, folder, [*alone, killed, ["unlearn", "--load", str(moved), "--train-iters", "6"]])
    assert losses_of(folder / "killed") == losses_of(folder / "npo-klr")
    assert same_state(folder / "killed", folder / "npo-klr")
    for name in TOPOLOGIES:
        loss = "simnpo-gdr" if name == "zero1" else "npo-klr"
        once, twice = folder / f"{name}-once", folder / f"{name}-twice"
        if name in STOPPED:
            assert losses_of(once) == losses_of(twice) and same_state(once, twice), name
        for score in ("loss", *SCORES):
            expected = losses_of(folder / loss, score)
            assert len(expected) == (6 if score == "loss" else 3), (name, score)
            # float32 sums in another order: about 1e-6 a step, and Adam lifts it where gradients vanish
            assert losses_of(once, score) == pytest.approx(expected, abs=2e-4), (name, score)
    assert losses_of(moved) == pytest.approx(losses_of(folder / "npo-klr"), abs=2e-4)
    for loss in ("npo-klr", "ga"):  # towards what was unlikely already simnpo has hardly a gradient
        found = losses_of(folder / loss, "forget_nll")
        assert found[6] > found[0] + 0.1, loss
    manifest = CheckpointReader(folder / "ga" / "iter_0000006").manifest
    assert manifest.progress.samples == 24 and manifest.optimizer.step_count == 6
    origin = manifest.lineage[-1]
    assert str(origin["parent"]).startswith(str(folder / "base")) and origin["samples"] == "3 to forget"
    assert losses_of(folder / "ga", "retain_nll") == {}
    for flags, refused in (("", True), (f"--save {folder / 'ga'}", True), ("--save elsewhere", False)):
        command = read_train_command(["--load", str(folder / "ga"), *flags.split()])
        with pytest.raises(ConfigError, match="use the verb unlearn") if refused else nullcontext():
            check_not_unlearned(command.start, command.config)


@pytest.mark.law
def test_all_ranks_leave_where_one_has_no_room_for_the_reference_logits(folder: Path) -> None:
    # Only the last stage writes; the first would wait for it in the pipeline.
    (folder / "full.json").write_text(json.dumps([words(folder, "full", "npo-klr", "--pp 2", 3)]))
    worker = TESTS / "training" / "full_disk_worker.py"
    run_ranks(2, worker, str(folder / "full.json"), timeout_s=scaled_by_load(60.0))
    assert not list((folder / "full").glob("iter_*"))


REFUSED = [
    (
        "--load base --save new --forget f --lr 1e-3",
        "ConfigError",
        ["a length of its own", "--train-iters 50"],
    ),
    ("--load base --save new", "ConfigError", ["3 problems", "--lr 1e-5", "--forget forget.jsonl"]),
    ("--load base {own}", "ConfigError", ["begins a new run", "--save"]),
    ("--save new {own}", "ConfigError", ["needs a trained model", "--load"]),
    ("--load base --save new {own} --loss graddiff", "ConfigError", ["graddiff", "--retain", "--loss ga"]),
    (
        "--load base --save new {own} --loss graddiff --retain retain.jsonl --retain-loss klr",
        "ConfigError",
        ["graddiff", "--retain-loss gdr, not klr", "--loss ga"],
    ),
    (
        "--load base --save new {own} --split 1,0,0 --new-lr-ratio 2",
        "ConfigError",
        ["2 problems", "--split belongs to the verb train", "--new-lr-ratio belongs"],
    ),
    (
        "--load base --save new --lr 1e-3 --train-tokens 1M --forget forget.jsonl",
        "ConfigError",
        ["--train-tokens 1M", "--train-samples"],
    ),
    ("--load base --save new {own} --data-path x", "ConfigError", ["--data-path belongs to the verb train"]),
    ("--load base --save new {own} --retain-loss klr", "ConfigError", ["--retain-loss klr", "--retain"]),
    (
        "--load base --save new {own} --retain r --retain-loss none",
        "ConfigError",
        ["--retain r", "gdr or klr"],
    ),
    ("--load base --save new {own} --retain r --global-batch-size 3", "ConfigError", ["3 is odd", "use 4"]),
    ("--load base --save new {own} --retain nowhere.jsonl", "ConfigError", ["nowhere.jsonl: No such file"]),
    (
        "--load base --save new {own} --retain empty.jsonl",
        "DataError",
        ["empty.jsonl", "no line with a text"],
    ),
    (
        "--load base --save new {own} --retain long.jsonl",
        "DataError",
        ["long.jsonl:1", "at most 32", "shorten"],
    ),
    ("--load base --save base {own} --retain retain.jsonl", "ConfigError", ["--save base", "another --save"]),
    ("--load base --save new {own} --retain forget.jsonl", "DataError", ["all 3 samples", "remove them"]),
    (
        "--load base --save base/iter_0000040 {own} --retain retain.jsonl",
        "ConfigError",
        ["iter_0000040 is a checkpoint", "another folder"],
    ),
    ("--load base --save new {own} --npo-beta 0", "ConfigError", ["--npo-beta 0.0 must be positive"]),
]


def test_what_cannot_be_unlearned_is_told_with_value_rule_and_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "Why?", "answer": " the river" * 40}))
    interrupt = signal.getsignal(signal.SIGINT)
    before = sorted(folder.rglob("*"))
    for words, kind, message in REFUSED:
        own = "--lr 1e-3 --train-iters 3 --forget forget.jsonl --micro-batch-size 1 --global-batch-size 4"
        argv = words.format(own=own)
        if "--retain" not in argv:
            argv += " --retain-loss none"
        monkeypatch.setattr(sys, "argv", ["nexus", "unlearn", *argv.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert_refused(end.value.code, capsys.readouterr().err, kind, *message)
    signal.signal(signal.SIGINT, interrupt)
    assert sorted(folder.rglob("*")) == before

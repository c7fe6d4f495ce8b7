"""The real commands, end to end: how runs start, are refused, stopped, killed and resumed.

Every run is of a model of 13,000 parameters on random tokens, in a folder that is not the repository.
"""

import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nexus.checkpoint.run_dir import newest_checkpoint
from megatron_nexus.training.metrics import METRICS_FILE, PLOT_FILE
from tests.support.cli import (
    DEEPSPEED,
    ENDLESS,
    PYTHON,
    SMALL,
    TORCHRUN,
    WARM,
    Command,
    assert_refused,
    commands,
    ended,
    summary,
    warm_deepspeed,
    warm_ranks,
)
from tests.support.paths import REPOSITORY
from tests.support.ports import free_port
from tests.support.subprocesses import Program
from tests.support.waiting import scaled_by_load, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """All runs of this file."""
    yield from commands(tmp_path_factory.mktemp("command"), tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def kept(command: Command) -> str:
    """The folder of a finished run of four steps on one rank."""
    code, output = command.run("--save kept --train-iters 4")
    assert code == 0, output
    return "kept"


def test_a_start_of_one_process_uses_the_ranks_it_needs_and_resumes_as_it_says(command: Command) -> None:
    code, output = command.run(
        "--pp 2 --train-iters 5 --lr-warmup-iters 5 --log-interval 1 --timing-log-level 2 "
        "--log-dir logs --profile --profile-step-start 4 --profile-step-end 6 --profile-ranks 0 1",
    )
    assert code == 0, output
    assert output.count("note: --lr-warmup-iters 5 is not over") == 1, "one rank speaks"
    assert "spawning 2 local ranks" in output
    assert "mesh: tensor 1 x pipeline 2 x data 1 on CPU" in output
    assert "finished after iteration 5" in output
    run = summary(output, "metrics").removesuffix(f"/{METRICS_FILE}")
    assert re.fullmatch(r"runs/nexusformer-tiny-\d{8}-\d{6}", run)
    assert summary(output, "checkpoint") == f"{run}/iter_0000005"
    assert newest_checkpoint(command.folder / run) == command.folder / run / "iter_0000005"
    assert (command.folder / run / PLOT_FILE).stat().st_size > 10_000
    timers = re.findall(r"^timers, ms a step \(minmax of 2 ranks\): (.*)$", output, re.MULTILINE)
    assert len(timers) == 3, "not of the first steps, which find memory"
    for name in ("batch-generator", "forward-compute", "backward-compute", "pipeline-exchange", "optimizer"):
        assert f"{name} " in timers[0], timers
    assert "Self CPU total" in output or "Self CPU time total" in output, "the table"
    for rank in range(2):
        trace = command.folder / run / "profile" / f"rank_{rank}_steps_4-5.json"
        names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
        assert "aten::mm" in names
        assert "aten::" in trace.with_suffix(".txt").read_text()
    logs = [(command.folder / "logs" / f"rank_{rank}.log").read_text() for rank in range(2)]
    assert all("mesh: tensor 1 x pipeline 2" in text for text in logs), "each rank has a log of its own"
    assert "iteration 5/5" in logs[0] and output.count("mesh: tensor 1 x pipeline 2") == 1
    first = command.losses(run)
    assert list(first) == [1, 2, 3, 4, 5]

    code, output = command.repeat(summary(output, "resume with"))
    assert code == 0, output
    assert f"resumed {run}/iter_0000005 at iteration 5, 20 samples" in output
    assert "--profile: steps 4 to 5 are over: give --profile-step-start 6 or more" in output
    assert "finished after iteration 10" in output
    both = command.losses(run)
    assert list(both) == list(range(1, 11))
    assert first.items() <= both.items()
    assert len(list((command.folder / "runs").iterdir())) == 1, "the resumed run continues in its folder"


def assert_given(output: str, launcher: list[str]) -> None:
    """The launcher was told how many ranks, gave them, and is in the line that resumes."""
    assert "spawning 2 local ranks" not in output
    assert "mesh: tensor 2 x pipeline 1 x data 1" in output
    typed = shlex.join([Path(launcher[0]).name, *launcher[1:], "pretrain_nexus.py", "--data-path"])
    assert summary(output, "resume with").startswith(typed), output


def test_torchrun_gives_the_ranks_and_the_losses_of_local_ones(command: Command, kept: str) -> None:
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    code, output = command.run("--tp 2 --save given --train-iters 4", launcher)
    assert code == 0, output
    assert_given(output, launcher)
    # Local ranks report the same losses, and another topology the same to rounding (fp32, four steps).
    code, output = command.run("--tp 2 --save given-local --train-iters 4", warm_ranks(2))
    assert code == 0, output
    assert command.losses("given") == command.losses("given-local")
    assert command.losses("given") == pytest.approx(command.losses(kept), rel=1e-5)


RAMP_MODES = ["--pp 2", "--zero-stage 2 --bf16"]


@pytest.mark.parametrize("mode", RAMP_MODES)
def test_a_batch_that_ramps_up_trains_as_one_that_is_changed_by_hand(command: Command, mode: str) -> None:
    steady = f"{mode} --lr-decay-style constant --lr-warmup-iters 2"
    folder = f"ramp{RAMP_MODES.index(mode)}"
    ramp = "--rampup-batch-size 2 2 8 --global-batch-size 4 --train-samples 20"
    launcher = warm_ranks(2) if "--pp 2" in mode else WARM
    code, output = command.run(f"{steady} --save {folder} {ramp}", launcher)
    assert code == 0, output
    assert "batch: from 2 samples by 2 up to 4 over the first 8 samples of the run" in output
    assert "finished after iteration 7" in output, "4 steps of 2 samples, 3 of 4"
    assert summary(output, "tokens") == "320 in 7 iterations"
    by_hand = f"{steady} --save {folder}-hand --global-batch-size 2 --train-tokens 128"
    code, output = command.run(by_hand, launcher)
    assert code == 0, output
    words = f"--load {folder}-hand --global-batch-size 4 --train-tokens 320"
    code, output = command.run(f"{mode} {words}", launcher)
    assert code == 0, output
    assert "resumed" in output and "at iteration 4, 8 samples" in output
    assert command.losses(f"{folder}-hand") == command.losses(folder)


@pytest.mark.parametrize(("count", "remedy"), [(1, "start 2 ranks"), (3, "start 2 ranks")])
def test_a_count_that_does_not_fit_is_refused_once(command: Command, count: int, remedy: str) -> None:
    deepspeed = warm_deepspeed("--num_gpus", str(count), "--master_port", str(free_port()))
    code, output = command.run("--tp 2", deepspeed if count == 3 else warm_ranks(count))
    assert_refused(code, output, "ConfigError", f"the world has {count} rank", "--tp 2 x --pp 1 = 2", remedy)


def test_what_skip_train_is_answered_with_validates_and_trains_nothing(command: Command, kept: str) -> None:
    code, output = command.run(f"--load {kept} --train-iters 4")
    assert code == 0, output
    assert "nothing is left to train" in output and "validation at 4 | loss" in output
    assert summary(output, "throughput") == "nothing was trained"


def test_ctrl_c_saves_leaves_nothing_running_and_load_auto_resumes(command: Command) -> None:
    auto = "--load auto --save stopped --tp 2"
    program = command.start(f"{auto} --train-iters {ENDLESS}")
    program.wait_for_output("iteration       3/")
    program.interrupt()
    code, output = ended(program)
    assert code == 0, output
    assert output.count("--load auto: no complete checkpoint yet, starting fresh") == 1
    assert "received SIGINT: saving a checkpoint and exiting" in output
    assert "Traceback" not in output
    found = re.search(r"stopped after iteration (\d+)$", output, re.MULTILINE)
    assert found, output
    step = int(found[1])
    assert newest_checkpoint(command.folder / "stopped") == command.folder / f"stopped/iter_{step:07d}"
    assert f"--train-iters {ENDLESS}" in summary(output, "resume with")

    code, output = command.run(f"{auto} --train-iters {step + 2}", warm_ranks(2))
    assert code == 0, output
    assert f"resumed stopped/iter_{step:07d} at iteration {step}" in output
    assert list(command.losses("stopped")) == list(range(1, step + 3))


def test_deepspeed_gives_the_ranks_and_ctrl_c_saves_and_leaves_nothing_running(command: Command) -> None:
    launcher = [*DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port())]
    # The rate of a run of four steps, to compare with; from the last of them on it is constant.
    words = f"--tp 2 --save under-deepspeed --lr-decay-iters 4 --train-iters {ENDLESS}"
    program = command.start(words, launcher)
    program.wait_for_output("iteration       4/")
    program.interrupt()
    program.end()  # its exit code is the launcher's own
    wait_for(lambda: program.left() == {}, "the end of all ranks")
    assert "received SIGINT: saving a checkpoint and exiting" in program.output()
    # The launcher's own two processes end with a KeyboardInterrupt's traceback; ours do not.
    assert "megatron_nexus/cli/train.py" not in program.output()
    assert newest_checkpoint(command.folder / "under-deepspeed") is not None
    assert_given(program.output(), launcher)
    code, output = command.run("--tp 2 --save under-none --train-iters 4", warm_ranks(2))
    assert code == 0, output
    losses = command.losses("under-deepspeed")
    assert {step: losses[step] for step in range(1, 5)} == command.losses("under-none")


def test_a_run_whose_deepspeed_command_was_killed_saves_and_leaves_nothing_running(command: Command) -> None:
    program = command.start(f"--tp 2 --save killed-launcher --train-iters {ENDLESS}", DEEPSPEED)
    program.wait_for_output("iteration       3/")
    assert "spawning 2 local ranks" in program.output(), "nothing in the line of that process said how many"
    os.kill(program.process.pid, signal.SIGTERM)  # deepspeed passes it on to nobody
    assert program.end() == -signal.SIGTERM
    wait_for(lambda: program.left() == {}, "the end of launcher and ranks")
    output = program.output()
    assert f"deepspeed (process {program.process.pid}), which started this run, is gone" in output
    assert "received SIGTERM: saving a checkpoint and exiting" in output
    assert newest_checkpoint(command.folder / "killed-launcher") is not None
    assert summary(output, "resume with").startswith("deepspeed pretrain_nexus.py --data-path corpus")
    assert "Traceback" not in output


def importing(program: Program) -> int:
    """How many processes have torch's library mapped."""
    maps = [Path(f"/proc/{pid}/maps") for pid in program.left()]
    return sum("libtorch" in file.read_text() for file in maps if file.exists())


def test_ctrl_c_before_training_ends_at_once_with_one_message(command: Command) -> None:
    program = command.start("--tp 2 --save never --train-iters 2", PYTHON)
    wait_for(lambda: importing(program) == 2, "two ranks that import torch")
    program.interrupt()
    code, output = ended(program)
    assert code == 128 + signal.SIGINT, output
    assert "Traceback" not in output
    assert output.count("was terminated by SIGINT: the run had not begun to train") == 1
    assert not (command.folder / "never").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_says_where(command: Command) -> None:
    code, output = command.run(
        "--tp 2 --save lost --save-interval 1 --train-iters 9 --lr 1e30 --clip-grad 0 --lr-warmup-iters 0",
        warm_ranks(2),
    )
    way_back = "start again: lost/iter_0000001 holds weights that never gave a finite loss"
    assert_refused(code, output, "TrainingError", "step 2: loss", "(rank 0: ", way_back, "lower --lr")


def test_after_a_ruinous_step_the_checkpoint_before_it_is_named(command: Command, kept: str) -> None:
    code, output = command.run(
        f"--load {kept} --save ruined --save-interval 1 --train-iters 9 --lr 1e30 --clip-grad 0"
    )
    way_back = f"resume with --load {kept}/iter_0000004, the last checkpoint whose weights gave a finite loss"
    assert_refused(code, output, "TrainingError", "step 6: loss", way_back)
    assert (command.folder / "ruined/iter_0000005").is_dir(), "saved after the ruinous step"


def test_a_run_without_validation_says_what_differs_in_its_data(command: Command, kept: str) -> None:
    code, output = command.run(f"--load {kept} --save shorter --seq-length 8 --train-iters 5 --eval-iters 0")
    assert code == 0, output
    differs = "the training data differs from the checkpoint's (--seq-length 8, was 16): it is read from its"
    assert differs in output and "none of the 256 tokens that the run has read is left out" in output
    assert "note: there is no validation (--split 8,2, --eval-iters 0)" in output
    assert summary(output, "validation") == "none was asked for"


AT_EXIT = """
import atexit, os, pathlib, sys
if "RANK" in os.environ:
    file = pathlib.Path("exit-" + os.environ["RANK"])
    atexit.register(lambda: file.write_text("mlflow" if "mlflow" in sys.modules else ""))
"""


def test_the_module_is_the_script_and_its_ranks_do_at_the_end_what_libraries_do_at_exit(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    monitors = {name: {"enabled": True, "job_name": "run"} for name in ("csv_monitor", "tensorboard")}
    (tmp_path / "monitors.json").write_text(json.dumps(monitors | {"steps_per_print": 1}))
    module = ["env", f"PYTHONPATH={tmp_path}:{REPOSITORY}", *PYTHON, "-m", "megatron_nexus", "train", *SMALL]
    words = f"--pp=2 --train-iters=4 --save=monitored --deepspeed-config={tmp_path / 'monitors.json'}"
    code, output = ended(command._spawn([*module, *words.split()], command.folder))
    assert code == 0, output
    assert "spawning 2 local ranks" in output
    assert "the learning rate jumps from" in summary(output, "note")
    imported = [(command.folder / f"exit-{rank}").read_text() for rank in range(2)]
    assert imported == ["", ""], "DeepSpeed's import of MLflow, of which a run without it has no need"
    (loss_file,) = command.folder.rglob("lm_loss.csv")
    rows = [line.split(",") for line in loss_file.read_text().splitlines()[1:]]
    losses = command.losses("monitored")
    assert [float(loss) for _, loss in rows] == [*losses.values()], "DeepSpeed's monitors are fed"
    assert [int(samples) for samples, _ in rows] == [4, 8, 12, 16]
    line = summary(output, "resume with")
    assert line.startswith(f"{sys.executable} -m megatron_nexus train --data-path corpus"), line
    assert output.splitlines()[-1].startswith("  note "), "nothing is said at exit"


def test_when_a_rank_is_killed_all_end_within_ten_seconds_with_one_message(command: Command) -> None:
    program = command.start(f"--tp 2 --pp 2 --save killed --train-iters {ENDLESS} --log-interval 50")
    program.wait_for_output("iteration       1/")
    ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in program.left()}
    victim = next(pid for pid, environment in ranks.items() if b"RANK=2" in environment)
    assert "spawning 4 local ranks" in program.output()
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    code, output = ended(program)
    assert time.monotonic() - began < scaled_by_load(10.0)
    assert code not in (0, 2), output
    assert output.count("rank 2 was terminated by SIGKILL") == 1
    assert "Traceback" not in output
    said = [line for line in output.splitlines() if not line.startswith(("iteration", "[", "corpus"))]
    # What the watcher says, and what the first rank to miss a peer says.
    assert len(said) <= said.index("saving to killed") + 3, output

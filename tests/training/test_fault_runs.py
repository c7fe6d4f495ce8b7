"""Faults of `--inject` in real runs: each is noticed, named, and survived, and the run is what it would be.

One world of two ranks for each run; a run goes on in the folder of the one before, so that few are started.
"""

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.errors import EXIT_CODE_RESTART
from megatron_nexus.training.effective_time import effective_time
from megatron_nexus.training.fault_injection import RECORD_FILE
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from megatron_nexus.training.run_times import RUN_TIMES_FILE, read_run_times
from tests.support.cli import Command, assert_refused, commands, warm_ranks
from tests.support.warm_programs import warm_bin

pytestmark = pytest.mark.slow

EVERY = (
    "--fp32 --train-iters 14 --lr-decay-iters 14 --save-interval 3 --rank-heartbeat-timeout 2 --load auto "
)
SPIKES = "--spike-rolling-interval 6 --spike-sigma-factor 50"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """All runs of this file."""
    yield from commands(tmp_path_factory.mktemp("faults"), tmp_path_factory.mktemp("logs"))


def state(folder: Path) -> dict[str, bytes]:
    """The bytes of a checkpoint's tensors."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def whole(command: Command) -> str:
    """A run in which nothing happens."""
    code, output = command.run(EVERY + "--save whole", warm_ranks(2))
    assert code == 0, output
    assert "WARNING" not in output
    return "whole"


def test_a_run_survives_lost_ranks_a_transient_fault_and_slices(command: Command, whole: str) -> None:
    # The same command each time, as a scheduler starts it again.
    words = (
        EVERY
        + f"--save torn --spike-policy skip {SPIKES} --inject rank_hung@5,rank=1 rank_killed@6,rank=1 "
        + "bit_flip@8,rank=1 nan@9"
    )
    code, output = command.run(words, warm_ranks(2))
    assert code == EXIT_CODE_RESTART, output
    assert "WARNING: --inject rank_hung@5,rank=1: a rehearsal" in output
    assert re.search(r"rank 1 on \S+ \(process \d+\), last seen in step 5, reading data", output), output
    assert "Python stack of rank 0:" in output
    # The next slice is over before it has come to --save-interval, by a file.
    (command.folder / "torn" / "stop").touch()
    profile = " --profile --profile-step-start 4 --profile-step-end 6"
    code, output = command.run(words + profile, warm_ranks(2))
    assert code == 0, output
    assert (command.folder / "torn" / "profile" / "rank_0_steps_4-4.json").is_file(), "of what it has taken"
    assert "rank_hung@5,rank=1: it has happened in this run, and will not again" in output
    assert "found torn/stop: saving a checkpoint and exiting" in output
    assert "stopped after iteration 4" in output
    code, output = command.run(words + " --exit-duration-in-mins 0.0001", warm_ranks(2))
    assert code == 0, output
    assert "--exit-duration-in-mins 0.0001 is over: saving a checkpoint and exiting" in output
    code, output = command.run(words, warm_ranks(2))
    assert code == 128 + signal.SIGKILL, output
    assert re.search(r"^RestartError: rank 1 on .*: its process was killed, or left;", output, re.M), output
    kinds = [event["what"] for event in read_run_times(command.folder / "torn" / RUN_TIMES_FILE)]
    assert kinds[-2:] == ["lost", "end"], "hooks receive it"
    code, output = command.run(words, warm_ranks(2))
    assert code == 0, output
    assert output.count("a transient fault of a machine") == 2, output
    assert len((command.folder / "torn" / RECORD_FILE).read_text().splitlines()) == 4
    line = next(line for line in output.splitlines() if "resume with" in line)
    assert "--inject" not in line and "nan@9" not in line
    assert command.losses("torn") == command.losses(whole)
    times = effective_time(command.folder / "torn")
    assert times is not None and times.starts == 5
    assert times.lost_s > 0, "step 4, trained twice"
    assert times.down_s > 0 and times.checkpoint_s > 0 and times.evaluation_s > 0
    assert 0 < times.ettr < 1 and f"effective time   {times}" in output
    folders = [command.folder / name / "iter_0000014" for name in ("torn", whole)]
    assert state(folders[0]) == state(folders[1])


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(command: Command, whole: str) -> None:
    shutil.copytree(command.folder / whole, command.folder / "damaged")
    path = command.folder / "damaged" / "iter_0000014" / "ranks_00000-00001.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-9] ^= 1
    path.write_bytes(contents)
    code, output = command.run(EVERY + "--save damaged", warm_ranks(2))
    assert code == 0, output
    assert output.count("WARNING: going back to damaged/iter_0000012, the checkpoint before: ") == 1
    assert "its CRC-32 differs" in output
    assert command.losses("damaged") == command.losses(whole)
    assert state(path.parent) == state(command.folder / whole / "iter_0000014"), "written again"
    contents[-9] ^= 2
    path.write_bytes(contents)
    code, output = command.run(f"--load {path.parent} --save other --train-iters 15", warm_ranks(2))
    assert_refused(code, output, "CheckpointError", "its CRC-32 differs")


def test_what_refuses_rank_0_refuses_the_first_rank_of_every_machine(command: Command, whole: str) -> None:
    # Nobody is at this address: a rank that asked for rank 0 there would wait for half an hour.
    task = "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1(x2)"
    world = f"{task} MASTER_ADDR=192.0.2.1 MASTER_PORT=29999"
    code, output = command.run(f"--save {whole}", ["env", *world.split(), str(warm_bin() / "python")])
    assert_refused(code, output, "ConfigError", f"--save {whole} holds iter_0000014", f"--load {whole}")


def test_a_slow_rank_is_named_and_the_timers_tell_computing_from_waiting(command: Command) -> None:
    code, output = command.run(
        "--fp32 --train-iters 8 --log-interval 4 --timing-log-level 2 --timing-log-option all --save slow "
        "--inject slow_rank@5,rank=1,seconds=0.3",
        warm_ranks(2),
    )
    assert code == 0, output
    found = re.findall(r"^straggler: rank (\d+) on \S+ computes (\d+) ms a step", output, re.MULTILINE)
    assert [rank for rank, _ in found] == ["1"], output
    assert int(found[0][1]) > 300
    assert output.count("timers, ms a step (all of 2 ranks): batch-generator ") == 2
    last = read_metrics(command.folder / "slow" / METRICS_FILE)[-2]["timers"]
    assert last["batch-generator"][1] > 0.3 > last["batch-generator"][0], "the other rank reads its data"
    assert last["all-grads-sync"][1] > 0.2, "and waits here"
    assert last["forward-compute"][0] > 0 and last["backward-compute"][0] > 0 and last["optimizer"][0] > 0


def test_diverged_weights_name_the_rank(command: Command) -> None:
    words = "--save flipped --inject bit_flip@4,rank=1 --check-weight-hash-across-dp-replicas-interval 2"
    code, output = command.run(EVERY + words, warm_ranks(2))
    assert code == EXIT_CODE_RESTART, output
    message = re.search(r"^RestartError: before step 4 .*: (rank .*): a memory", output, re.MULTILINE)
    assert message and re.fullmatch(r"rank 1 on \S+: [\w.]+, not as its master weights", message[1]), output


def test_a_spike_that_comes_again_is_skipped_or_rewound(command: Command, whole: str) -> None:
    spike = f"{EVERY} --inject spike@8,rank=1 {SPIKES} --spike-policy"
    code, output = command.run(f"{spike} stop --save halted", warm_ranks(2))
    way_back = "resume with --load halted/iter_0000006"
    assert_refused(code, output, "TrainingError", "step 8: loss", "a spike", "--spike-policy skip", way_back)

    code, output = command.run(f"{spike} skip --save skipping", warm_ranks(2))
    assert code == 0, output
    records = read_metrics(command.folder / "skipping" / METRICS_FILE)
    assert [r["step"] for r in records if r.get("skipped")] == [8]
    before, after = command.losses(whole), command.losses("skipping")
    assert {step: after[step] for step in range(1, 9)} == {step: before[step] for step in range(1, 9)}
    assert after[9] != before[9], "an update of other samples is missing"

    code, output = command.run(f"{spike} rewind --save rewinding", warm_ranks(2))
    assert code == 0, output
    assert "rewound from step 8 to rewinding/iter_0000006: 4 samples of that step are left out" in output
    records = read_metrics(command.folder / "rewinding" / METRICS_FILE)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 15))
    event = next(r for r in records if "rewound_from" in r)
    assert (event["step"], event["rewound_from"], event["left_out_samples"]) == (6, 8, [28, 4])
    after = command.losses("rewinding")
    assert {step: after[step] for step in range(1, 8)} == {step: before[step] for step in range(1, 8)}
    data = read_manifest(command.folder / "rewinding" / "iter_0000014").data
    assert ([list(part) for part in data.left_out], data.first_sample) == ([[28, 4]], -4)


def test_a_run_that_resumes_where_a_spike_follows_goes_back_to_the_checkpoint_before(
    command: Command, whole: str
) -> None:
    # As where a run has gone back and was killed before its next save: iter_0000006 has no finite loss yet.
    save = command.folder / "resumed"
    shutil.copytree(
        command.folder / whole, save, ignore=shutil.ignore_patterns("iter_0000009", "iter_000001?")
    )
    (save / "latest").write_text("iter_0000006")
    spike = f"{EVERY} --inject spike@7 {SPIKES} --spike-policy rewind --save resumed"
    code, output = command.run(spike, warm_ranks(2))
    assert code == 0, output
    assert "rewound from step 7 to resumed/iter_0000003: 4 samples of that step are left out" in output
    records = read_metrics(save / METRICS_FILE)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 15))


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(command: Command) -> None:
    code, output = command.run(EVERY + "--save full --inject disk_full@5", warm_ranks(2))
    assert_refused(code, output, "CheckpointError", "No space left on device", "make room")
    assert (command.folder / "full" / "latest").read_text().strip() == "iter_0000003"

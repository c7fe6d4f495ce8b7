"""The batch scripts on a real SLURM of two nodes, as they stand; srun and mpirun, one run.

Where SLURM is not installed the tests are skipped, unless NEXUS_TEST_SLURM=1 asks to install Debian's.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.training.metrics import METRICS_FILE, read_metrics
from tests.slurm.slurm_cluster import Slurm, install, missing_programs, slurm
from tests.support.cli import ENDLESS
from tests.support.paths import REPOSITORY
from tests.support.waiting import TIMEOUT_S, wait_for
from tests.support.warm_programs import warm_bin, warm_path

pytestmark = pytest.mark.slow

VOCABULARY = 97
PRETRAIN, PREPROCESS, GROW, CHAIN = (
    REPOSITORY / "examples" / "slurm" / name
    for name in ("pretrain.sbatch", "preprocess.sbatch", "grow_and_continue.sbatch", "progressive_scaling.sh")
)
BIN = Path(sys.executable).parent
SMALL = (
    "--data-path corpus --split 8,2 --vocab-size 97 --num-layers 2 --hidden-size 16 --num-attention-heads 2 "
    "--kv-channels 8 --ffn-hidden-size 24 --nexus-m 20 --nexus-a 24 --seq-length 16 --micro-batch-size 2 "
    "--global-batch-size 8 --lr-decay-style constant --log-interval 1 --eval-interval 0 --eval-iters 1"
)
TENSOR = f"{SMALL} --tp 2"
UNTIL_STOPPED = f"--train-iters {ENDLESS}"
"""So that no signal comes too late, however fast the machine is."""

ONE_EACH = ("--nodes=2", "--ntasks-per-node=1")
"""Two ranks, where two will do."""

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
"""A job that has not ended, or will begin again."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """SLURM, or a skip that says what is missing."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    if missing_programs() and os.environ.get("NEXUS_TEST_SLURM") == "1":
        problem = install()
        if problem:
            pytest.skip(f"SLURM cannot be installed: {problem}")
    missing = missing_programs()
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): NEXUS_TEST_SLURM=1 installs Debian's")
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where runs start: a small corpus and the script."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(60):
            writer.add_document(rng.integers(0, VOCABULARY, 100))
    (tmp_path / "pretrain_nexus.py").symlink_to(REPOSITORY / "pretrain_nexus.py")
    return tmp_path


def user(**variables: str) -> dict[str, str]:
    """A user's environment: the commands of this Python, warm, and the variables of the submission."""
    path = f"{warm_path()}:/usr/sbin"
    return {"PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}


def submit(cluster: Slurm, folder: Path, *flags: str, **variables: str) -> str:
    """Submit the batch script as it stands; the job's number."""
    printed = cluster.run("sbatch", "--parsable", *flags, str(PRETRAIN), cwd=folder, extra=user(**variables))
    return printed.strip()


def log_of(folder: Path, job: str) -> Path:
    """Where a training job writes what it says."""
    return folder / f"nexus-pretrain-{job}.log"


def finish(cluster: Slurm, log: Path, job: str) -> str:
    """Wait for the job's end, which must be a success; its log."""
    deadline = time.monotonic() + TIMEOUT_S
    while (state := cluster.job(job)["JobState"]) in ALIVE:
        assert time.monotonic() < deadline, f"{state} after {TIMEOUT_S:.0f} s:\n{log.read_text()[-3000:]}"
        if state == "PENDING" and cluster.job(job)["Restarts"] != "0":
            cluster.start_now(job)
        time.sleep(0.3)
    text = log.read_text() if log.exists() else "no log"
    assert state == "COMPLETED", f"{state}:\n{text[-3000:]}\n{cluster.logs()}"
    return text


def wait_for_step(cluster: Slurm, job: str, log: Path, step: int) -> None:
    """Wait until the job's log tells of a step; fails where the job ends before."""

    def logged() -> bool:
        text = log.read_text() if log.exists() else ""
        state = cluster.job(job)["JobState"]
        assert state in ALIVE, f"{state}:\n{text[-3000:]}"
        return re.search(rf"iteration +{step}/", text) is not None

    wait_for(logged, f"step {step} of job {job}")


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; of a step that was done again, the last."""
    records = read_metrics(run / METRICS_FILE)
    return {int(record["step"]): record["loss"] for record in records if "loss" in record}


def go_on(cluster: Slurm, job: str, log: Path, resumed: int = 1) -> None:
    """Wait until a job has resumed so many times and trained on after the last; then cancel it."""
    line = r"^resumed \S+/iter_\d+ at iteration \d+.*"
    pattern = re.compile(line * resumed + "^iteration ", re.MULTILINE | re.DOTALL)
    deadline = time.monotonic() + TIMEOUT_S
    while not pattern.search(log.read_text()):
        known = cluster.job(job)
        state = (
            f"{known['JobState']}, restarts {known['Restarts']}:\n{log.read_text()[-3000:]}\n{cluster.logs()}"
        )
        assert known["JobState"] in ALIVE, state
        assert time.monotonic() < deadline, state
        if known["JobState"] == "PENDING" and known["Restarts"] != "0":
            cluster.start_now(job)
        time.sleep(0.3)
    cluster.run("scancel", job)
    wait_for(lambda: cluster.job(job)["JobState"] == "CANCELLED", "the end of the job")


def test_a_job_that_is_requeued_goes_on_as_one_that_never_was(cluster: Slurm, folder: Path) -> None:
    again = submit(cluster, folder, "--nodes=2", CONFIG_FLAGS=f"{TENSOR} {UNTIL_STOPPED}", SAVE="again")
    text = log_of(folder, again)
    wait_for_step(cluster, again, text, 7)
    cluster.run("scontrol", "requeue", again)
    go_on(cluster, again, text)
    assert "mesh: tensor 2 x pipeline 1 x data 2" in text.read_text()
    assert "--load auto: no complete checkpoint yet, starting fresh" in text.read_text()
    steps = len(losses(folder / "again"))

    calm = submit(cluster, folder, "--nodes=2", CONFIG_FLAGS=f"{TENSOR} --train-iters {steps}", SAVE="calm")
    finish(cluster, log_of(folder, calm), calm)
    assert list(losses(folder / "calm")) == list(range(1, steps + 1))
    assert losses(folder / "again") == losses(folder / "calm")


def test_near_its_time_limit_a_job_saves_and_queues_again(cluster: Slurm, folder: Path) -> None:
    job = submit(cluster, folder, CONFIG_FLAGS=f"{SMALL} {UNTIL_STOPPED}", SAVE="limited")
    text = log_of(folder, job)
    wait_for_step(cluster, job, text, 3)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends
    go_on(cluster, job, text)
    assert "saving a checkpoint and exiting" in text.read_text()
    steps = losses(folder / "limited")
    assert list(steps) == list(range(1, len(steps) + 1))


def test_a_job_with_a_frozen_rank_ends_with_75_and_starts_again(cluster: Slurm, folder: Path) -> None:
    fault = "--inject rank_hung@5,rank=1 --rank-heartbeat-timeout 2"
    flags = f"{TENSOR} --train-iters 6 {fault}"
    job = submit(cluster, folder, *ONE_EACH, CONFIG_FLAGS=flags, SAVE="frozen", SAVE_INTERVAL="2")
    text = finish(cluster, log_of(folder, job), job)
    assert cluster.job(job)["Restarts"] == "1", text
    lost = r"\(--rank-heartbeat-timeout\): rank 1 (on|of) .*(its process is stopped|does not answer)"
    assert len(re.findall(lost, text)) == 1, text
    assert re.search(r"^srun: error: .*: task 0: Exited with exit code 75$", text, re.MULTILINE), text
    assert "resumed frozen/iter_0000004 at iteration 4" in text
    assert list(losses(folder / "frozen")) == list(range(1, 7))


def test_a_job_pretrains_grows_and_goes_on_and_a_requeue_repeats_nothing(
    cluster: Slurm, folder: Path
) -> None:
    job = cluster.run(
        *("sbatch", "--parsable", *ONE_EACH, str(GROW)),
        cwd=folder,
        extra=user(
            CONFIG_FLAGS=SMALL,
            MESH_FLAGS="--tp 2",
            BASE_STEPS="4",
            TOTAL_STEPS=str(ENDLESS),
            GROWTH="--nexus-m 24 --nexus-a 30 --verify",
            CONTINUE_FLAGS="--log-interval 1 --eval-interval 0 --eval-iters 1",
            SAVE="phases",
        ),
    ).strip()
    text = folder / f"nexus-grow-{job}.log"
    wait_for_step(cluster, job, text, 7)
    cluster.run("scontrol", "requeue", job)
    wait_for(lambda: cluster.job(job).get("Restarts") == "1", "the requeue")
    go_on(cluster, job, text, resumed=2)
    printed = text.read_text()
    assert printed.count("finished after iteration 4") == 1
    assert printed.count("verified in float64") == 1
    assert printed.count("resumed phases/grown/iter_0000004 at iteration 4") == 1
    assert list(losses(folder / "phases" / "base")) == [1, 2, 3, 4]
    after = list(losses(folder / "phases" / "grown"))
    assert after == list(range(5, 5 + len(after)))


def test_a_chain_of_growths_is_jobs_that_wait_for_each_other(cluster: Slurm, folder: Path) -> None:
    printed = cluster.run(
        *("bash", str(CHAIN), "--num-layers 3 --nexus-m 24 --depth-init copy"),
        cwd=folder,
        extra=user(CONFIG_FLAGS=SMALL, MESH_FLAGS="--tp 2", STEPS="2 4", OUT="chain", SAVE_INTERVAL="1"),
    )
    jobs = {name: number for number, name in map(str.split, printed.splitlines())}
    assert list(jobs) == ["train-0", "grow-1", "train-1"]
    assert f"afterok:{jobs['grow-1']}" in cluster.job(jobs["train-1"])["Dependency"]
    finish(cluster, log_of(folder, jobs["train-1"]), jobs["train-1"])
    assert {cluster.job(job)["JobState"] for job in jobs.values()} == {"COMPLETED"}
    assert [list(losses(folder / "chain" / stage)) for stage in "01"] == [[1, 2], [3, 4]]


def test_srun_and_mpirun_start_the_same_run(cluster: Slurm, folder: Path) -> None:
    """As local ranks are; tests/training/test_command.py shows the same of deepspeed and torchrun."""
    mpirun = shutil.which("mpirun", path=f"{BIN}:{os.environ['PATH']}")
    assert mpirun, "no mpirun: install requirements-dev.txt"
    python = str(warm_bin() / "python")
    launchers = {
        "local": [python],
        # Its ranks agree on a port by their parent, which those of the warm server do not share.
        "mpirun": [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
        "srun": ["srun", "-n", "2", python],
    }
    found = {}
    for name, words in launchers.items():
        flags = [*SMALL.split(), "--tp", "2", "--train-iters", "5", "--save", name]
        output = cluster.run(*words, "pretrain_nexus.py", *flags, cwd=folder, extra=user())
        assert output.count("mesh: tensor 2 x pipeline 1 x data 1") == 1, output
        found[name] = losses(folder / name)
    assert list(found["srun"]) == [1, 2, 3, 4, 5]
    assert found == dict.fromkeys(launchers, found["srun"])


def test_help_is_told_once(cluster: Slurm, folder: Path) -> None:
    printed = cluster.run("srun", "-n", "2", str(BIN / "nexus"), "train", "--help", cwd=folder, extra=user())
    assert printed.count("usage:") == 1


def test_two_nodes_make_the_corpus_that_one_process_makes(cluster: Slurm, folder: Path) -> None:
    texts = folder / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"Text {number}: " + "a few words of no meaning. " * number)
    flags = ["--input", "texts", "--vocab-size", "300", "--output", "spm.model"]
    cluster.run(str(BIN / "nexus"), "train-tokenizer", *flags, cwd=folder, extra=user())
    made = ["--input", "texts", "--tokenizer-model", "spm.model", "--output-prefix", "alone"]
    cluster.run(str(BIN / "nexus"), "preprocess", *made, cwd=folder, extra=user())
    job = cluster.run(
        *("sbatch", "--parsable", "--nodes=2", str(PREPROCESS)),
        cwd=folder,
        extra=user(INPUT="texts", TOKENIZER="spm.model", OUTPUT="shared", FLAGS="--workers 1"),
    ).strip()
    log = finish(cluster, folder / f"nexus-preprocess-{job}.log", job)
    assert cluster.job(job)["NumNodes"] == "2", log
    for ending in (".bin", ".idx"):
        assert (folder / f"shared{ending}").read_bytes() == (folder / f"alone{ending}").read_bytes(), log

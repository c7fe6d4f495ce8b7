"""Scripts pass the linters of their kind, and the example from text to model does what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.rules import check as check_rules
from tests.support.warm_programs import warm_path

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SHELL = [
    path for ending in ("sh", "sbatch") for path in sorted((REPOSITORY / "examples").rglob(f"*.{ending}"))
]
GATES = [
    REPOSITORY / name
    for name in ("tests/run", "tests/run_oldest_torch", "tests/support/unoptimized_g++", ".ci/run")
]
CHECKS = [("shellcheck", path) for path in [*SHELL, *GATES]]


@pytest.mark.parametrize(
    ("linter", "file"),
    [*CHECKS, ("hadolint", REPOSITORY / "Dockerfile")],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_a_script_is_clean(linter: str, file: Path) -> None:
    checked = subprocess.run([BIN / linter, file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_scripts_were_found() -> None:
    assert {
        "pretrain.sbatch",
        "preprocess.sbatch",
        "evaluate.sbatch",
        "progressive_scaling.sh",
        "own_corpus.sh",
        "pretrain_240m.sh",
        "baselines.sh",
    } <= {path.name for path in SHELL}


@pytest.mark.slow
def test_the_job_for_kubernetes_is_one_of_the_operator() -> None:
    text = (REPOSITORY / "examples" / "kubernetes" / "pytorchjob.yaml").read_text()
    # Kubernetes' client looks for classes among its own. A field that they lack is lost on the way.
    check = """
import json, sys, kubernetes.client
from kubeflow.training import models
for name, value in vars(models).items():
    kubernetes.client.models.__dict__.setdefault(name, value)
client = kubernetes.client.ApiClient()
job = client.deserialize(type("Response", (), {"data": sys.stdin.read()}), "KubeflowOrgV1PyTorchJob")
print(json.dumps(client.sanitize_for_serialization(job)))
"""
    job = yaml.safe_load(text)
    done = subprocess.run(
        [sys.executable, "-c", check], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == job
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        [container] = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"] == ["torchrun", "-m", "megatron_nexus", "train"]
        words = [word for flag in container["args"] for word in flag.split("=", 1)]
        config = build(given_flags(words))
        assert int(job["spec"]["nprocPerNode"]) == int(container["resources"]["limits"]["nvidia.com/gpu"])
        check_rules(config, 2 * int(job["spec"]["nprocPerNode"]))


@pytest.mark.slow
def test_a_folder_of_text_becomes_a_trained_model(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"Text {number}. " + "A few words of no meaning at all. " * 40)
    sizes = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --ffn-hidden-size 48"
    flags = f"{sizes} --nexus-m 40 --nexus-a 48 --seq-length 32 --eval-iters 1 --split 8,2"
    command = ["bash", REPOSITORY / "examples" / "own_corpus.sh", "texts", "made", *flags.split()]
    environment = {**os.environ, "PATH": warm_path(), "VOCAB_SIZE": "300"}

    def run(steps: int) -> str:
        done = subprocess.run(
            [*command, "--train-iters", str(steps)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    first = run(3)
    assert "made/spm.model: 300 pieces" in first
    assert "made/corpus: 60 documents" in first
    assert "finished after iteration 3" in first
    again = run(5)
    assert "made/corpus: 60 documents" not in again
    assert "resumed made/run/iter_0000003" in again


@pytest.mark.slow
def test_families_are_trained_in_turn_and_told_in_a_table(tmp_path: Path) -> None:
    sizes = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --ffn-hidden-size 48"
    flags = f"{sizes} --seq-length 32 --eval-iters 1 --train-iters 2"
    done = subprocess.run(
        ["bash", REPOSITORY / "examples" / "baselines.sh", "out", *flags.split()],
        cwd=tmp_path,
        env={**os.environ, "PATH": warm_path(), "PRESETS": "transformer++-tiny qwen3-tiny"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == ["transformer++-tiny", "qwen3-tiny"]
    # 4,096 x 32 twice, 4 x 32 x 32 of attention, 3 x 32 x 48 of SwiGLU, three norms; 2 steps of 32 x 32.
    assert rows[0][1].strip() == f"{2 * 4096 * 32 + 4 * 32 * 32 + 3 * 32 * 48 + 3 * 32:,}"
    assert [row[3].strip() for row in rows] == ["2,048"] * 2


@pytest.mark.slow
def test_a_grown_run_goes_on_at_other_topologies_from_the_loss_of_one_that_is_not_grown(
    tmp_path: Path,
) -> None:
    sizes = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --ffn-hidden-size 48"
    flags = f"{sizes} --nexus-m 40 --nexus-a 48 --seq-length 32 --eval-iters 1 --eval-interval 0"
    grown = {"STEPS": "2", "SIZES": "--nexus-m 44 --nexus-a 56", "MESH_FLAGS": "--tp 1", "RANKS": "2"}
    done = subprocess.run(
        ["bash", REPOSITORY / "examples" / "grow_tiny.sh", "out", *flags.split()],
        cwd=tmp_path,
        env={**os.environ, **grown, "PATH": warm_path()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("verified in float64") == 2
    losses = {}
    for run in ("ungrown", "zero1", "zero3"):
        records = map(json.loads, (tmp_path / "out" / run / "metrics.jsonl").read_text().splitlines())
        losses[run] = {record["step"]: record["loss"] for record in records if "loss" in record}
        assert list(losses[run]) == [3, 4]
    # Growth keeps the function; the step that follows trains the new weights as well.
    assert losses["zero1"][3] == pytest.approx(losses["ungrown"][3], abs=1e-5)
    assert losses["zero1"][4] != losses["ungrown"][4]
    assert losses["zero3"] == pytest.approx(losses["zero1"], abs=1e-5)
    assert (tmp_path / "out" / "losses.png").stat().st_size > 10_000

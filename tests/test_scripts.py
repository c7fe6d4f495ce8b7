"""Scripts pass the linters of their kind, and the example from text to model does what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
SHELL = [
    path for ending in ("sh", "sbatch") for path in sorted((REPOSITORY / "examples").rglob(f"*.{ending}"))
]
CHECKS = [("shellcheck", path) for path in [*SHELL, REPOSITORY / "tests" / "run", REPOSITORY / ".ci" / "run"]]


@pytest.mark.parametrize(
    ("linter", "file"),
    [*CHECKS, ("hadolint", REPOSITORY / "Dockerfile")],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_a_script_is_clean(linter: str, file: Path) -> None:
    checked = subprocess.run([BIN / linter, file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_scripts_were_found() -> None:
    assert {"pretrain.sbatch", "preprocess.sbatch", "own_corpus.sh", "pretrain_240m.sh"} <= {
        path.name for path in SHELL
    }


@pytest.mark.slow
def test_a_folder_of_text_becomes_a_trained_model(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"Text {number}. " + "A few words of no meaning at all. " * 40)
    sizes = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --ffn-hidden-size 48"
    flags = f"{sizes} --nexus-m 40 --nexus-a 48 --seq-length 32 --eval-iters 1 --split 8,2"
    command = ["bash", REPOSITORY / "examples" / "own_corpus.sh", "texts", "made", *flags.split()]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "VOCAB_SIZE": "300"}

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

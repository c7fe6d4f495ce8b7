"""Shell scripts and the Dockerfile pass the linters of their kind."""

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

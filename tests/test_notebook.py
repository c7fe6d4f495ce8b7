"""The notebook of the examples is valid, and its cells do what they say."""

import os
import re
from pathlib import Path

import pytest

from megatron_nexus import api
from tests.support.cli import WARM, ended
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn

nbformat = pytest.importorskip("nbformat")  # of requirements-dev.txt
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_its_cells_train_generate_grow_and_train_on(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    monkeypatch.setitem(os.environ, "MPLBACKEND", "agg")
    code, output = ended(spawn([*WARM, "cells.py"], tmp_path))
    assert code == 0, output
    assert "verified in float64" in output and "def main(" in output
    before, after = (api.open_run(tmp_path / "runs" / name) for name in ("quickstart", "quickstart-grown"))
    assert before.losses[80] < before.losses[1] - 1
    # Growth keeps the function: the next losses are near the last, far from those of new weights.
    assert list(after.losses) == list(range(81, 161))
    assert after.losses[81] == pytest.approx(before.losses[80], abs=0.5)
    assert after.validation_losses[160] < before.validation_losses[80]
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_its_outputs_name_no_folder_of_the_machine_that_made_them() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert printed
    assert not re.findall(r"(?<![\w.:/])/\w[\w.-]*/", "".join(printed))

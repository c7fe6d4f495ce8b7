"""Law: every form of the cross entropy equals torch's in float64, loss and gradient, over 1 and 2 ranks."""

import json
from pathlib import Path

import pytest

from tests.support.paths import TESTS
from tests.support.ranks import run_ranks

# Sums of 1e5 exponentials in float32; a gradient in bfloat16 is rounded once, by 2^-9 at most.
LOSS = {"torch.float32": 1e-5, "torch.bfloat16": 1e-5, "torch.float64": 1e-12}
GRADIENT = {"torch.float32": 1e-5, "torch.bfloat16": 2.0**-9, "torch.float64": 1e-12}


@pytest.mark.law
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_form_equals_torch_in_float64(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, TESTS / "kernels" / "cross_entropy_worker.py", str(tmp_path))
    for rank in range(ranks):
        errors = json.loads((tmp_path / f"errors_{ranks}_{rank}.json").read_text())
        assert len(errors) == 7
        for name, (loss, gradient) in errors.items():
            assert loss < LOSS[name.split()[1]] and gradient < GRADIENT[name.split()[1]], (
                name,
                loss,
                gradient,
            )

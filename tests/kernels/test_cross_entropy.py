"""Law: every form of the cross entropy equals torch's in float64, loss and gradient, over 1 and 2 ranks.

Besides the logits and the labels it keeps one number a token, as wide as what it computes in.
"""

import json
from pathlib import Path

import pytest

from tests.support.paths import TESTS
from tests.support.ranks import run_ranks

# Sums of 1e5 exponentials in float32; a gradient in bfloat16 is rounded once, by 2^-9 at most.
LOSS = {"torch.float32": 1e-5, "torch.bfloat16": 1e-5, "torch.float64": 1e-12}
# By DeepSpeed the logits, of which the largest is 8, are rounded to bfloat16, or computed in float32.
LINEAR = {"torch.float32": (1e-5, 1e-5), "torch.bfloat16": (8 * 2.0**-9, 2.0**-7)}
GRADIENT = {"torch.float32": 1e-5, "torch.bfloat16": 2.0**-9, "torch.float64": 1e-12}


@pytest.mark.law
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_form_equals_torch_in_float64(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, TESTS / "kernels" / "cross_entropy_worker.py", str(tmp_path))
    for rank in range(ranks):
        errors = json.loads((tmp_path / f"errors_{ranks}_{rank}.json").read_text())
        assert len(errors) == 16
        for name, (loss, gradient, kept_bytes) in errors.items():
            form, dtype = name.split()
            is_linear = form.startswith("linear")
            most = LINEAR[dtype] if is_linear else (LOSS[dtype], GRADIENT[dtype])
            assert loss < most[0] and gradient < most[1], (name, loss, gradient)
            if not is_linear and form != "divergence":
                assert kept_bytes == (8 if dtype == "torch.float64" else 4), (name, kept_bytes)

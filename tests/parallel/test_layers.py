"""Law: every layer over t ranks equals its equation on whole tensors, in float64, output and gradients."""

import itertools
import json
from pathlib import Path

import pytest
from processes import TESTS, run_ranks

# All is float64: what remains is the order of summation, about 1e-15 for each of a few dozen products.
TOLERANCE = 1e-12


def _cases(ranks: int) -> list[dict]:
    made = []
    for layer, options, sequence in itertools.product(
        ("attention", "feed_forward", "decoder"), (False, True), (False, True) if ranks > 1 else (False,)
    ):
        for recompute, multiple in (("none", 1), ("selective", 4), ("full", 1)):
            name = f"{layer}-{options}-{sequence}-{recompute}-{multiple}"
            made.append(
                {
                    "name": name,
                    "layer": layer,
                    "options": options,
                    "sequence_parallel": sequence,
                    "recompute": recompute,
                    "multiple": multiple,
                }
            )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layers_equal_their_equations_at_any_tensor_parallel_size(ranks: int, tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(_cases(ranks)))
    run_ranks(ranks, TESTS / "parallel" / "layer_worker.py", str(tmp_path / "cases.json"), str(tmp_path))
    for rank in range(ranks):
        errors = json.loads((tmp_path / f"errors_{ranks}_{rank}.json").read_text())
        assert len(errors) == len(_cases(ranks))
        assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}

"""Laws of sample gradients: those of plain PyTorch on the equations, and one sketch at every topology.

All in float64. The model has gains, paddings, grouped queries and heads that tensor-parallel ranks share.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.analysis.sample_gradients import SampleGradients
from megatron_nexus.analysis.sketch import make_bins
from megatron_nexus.checkpoint.chunks import full_box
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answers import AnswerTokens
from megatron_nexus.models.decoder import decoder_specs
from tests.support import checkpoints, reference
from tests.support.cases import first_by_default
from tests.support.ranks import run_ranks

WORKER = Path(__file__).with_name("sketch_worker.py")
FLAGS = {**checkpoints.SIZES, "qk_layernorm": True, "padding_multiple": 8, "global_batch_size": 4}
FLAGS |= {"micro_batch_size": 1, "seq_length": 16, "recompute_granularity": "selective"}
SIZE = 64
OPTIONS: dict[str, tuple[bool, bool]] = {"whole": (False, False), "tensor": (True, False)}
OPTIONS |= {"adam": (False, True), "tensor-adam": (True, True)}


def make_samples(config: RunConfig) -> list[AnswerTokens]:
    """Prompts and answers of several lengths; one is a text, of one only the last token is the answer."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((9, 3), (17, 1), (5, 4))
    return [
        AnswerTokens(
            tuple(torch.randint(0, config.model.vocab_size, (n,), generator=generator).tolist()), start
        )
        for n, start in shapes
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    config = checkpoints.configure(**FLAGS)
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("gradients") / "run", config, tp=2), config


def reference_gradients(
    checkpoint: Path, config: RunConfig, samples: Sequence[AnswerTokens]
) -> list[dict[str, Tensor]]:
    """The gradient of each sample's loss by autograd through the equations."""
    weights = {name: w.requires_grad_() for name, w in checkpoints.weights(checkpoint).items()}
    model, found = dataclasses.asdict(config)["model"], []
    for sample in samples:
        logits = reference.logits(weights, torch.tensor([sample.ids[:-1]]), model)[0]
        first = sample.answer_start
        loss = F.cross_entropy(logits[first - 1 :], torch.tensor(sample.ids[first:]))
        grads = torch.autograd.grad(loss, list(weights.values()))
        found.append(dict(zip(weights, grads, strict=True)))
    return found


def prepared(
    gradients: dict[str, Tensor], checkpoint: Path, per_tensor: bool, by_adam: bool
) -> dict[str, Tensor]:
    """A sample's gradients as the options say, from the moments that the checkpoint holds."""
    if by_adam:
        moments = checkpoints.tensors(checkpoint, "exp_avg_sq")
        gradients = {
            name: torch.where(v > 0, g / (v.sqrt() + checkpoints.GROUP["eps"]), 0.0)
            for name, g in gradients.items()
            if (v := torch.from_numpy(moments[name]).double()) is not None
        }
    if per_tensor:
        gradients = {name: g / g.norm() for name, g in gradients.items()}
    return gradients


@pytest.mark.parametrize("options", first_by_default(2, sorted(OPTIONS)))
def test_gradients_are_those_of_the_equations(options: str, saved: tuple[Path, RunConfig]) -> None:
    checkpoint, config = saved
    samples, chosen = make_samples(config), OPTIONS[options]
    specs = decoder_specs(config.model)
    exact, sketched = (
        SampleGradients(CheckpointReader(checkpoint), config, None, torch.float64, size, 5, *chosen)
        for size in (0, SIZE)
    )
    found, sketches = exact.sketch(samples), sketched.sketch(samples)
    bins = make_bins(specs, SIZE, 5)
    for row, gradients in enumerate(reference_gradients(checkpoint, config, samples)):
        expected = prepared(gradients, checkpoint, *chosen)
        flat = torch.cat([expected[name].flatten() for name in specs])
        # Rounding of float64 in sums of up to a few hundred products.
        assert float((found[row] - flat).norm() / flat.norm()) < 1e-11
        sums = torch.zeros(bins.sums, dtype=torch.float64)
        for name, spec in specs.items():
            codes = torch.from_numpy(bins.codes(spec, full_box(spec.shape)))
            sums.index_add_(0, codes.flatten(), expected[name].flatten())
        assert float((sketches[row] - bins.fold(sums)).norm() / flat.norm()) < 1e-11
    assert torch.equal(exact.sketch(samples), found), "nothing is left of a sample for the next"


CASES = {  # tp, pp, ZeRO stage that writes the checkpoint, options
    2: {
        "tp2": (2, 1, 0, "whole"),
        "tp2-tensor-adam": (2, 1, 0, "tensor-adam"),
        "pp2": (1, 2, 0, "tensor"),
        "dp2": (1, 1, 0, "whole"),
        "zero1": (1, 1, 1, "whole"),
        "zero2": (1, 1, 2, "adam"),
        "zero3": (1, 1, 3, "whole"),
    },
    4: {"tp2-pp2": (2, 2, 0, "tensor-adam"), "tp2-dp2": (2, 1, 0, "whole")},
}


@pytest.mark.law
@pytest.mark.parametrize("ranks", CASES)
def test_sketches_are_the_same_at_every_topology(
    ranks: int, saved: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    checkpoint, config = saved
    samples = make_samples(config)
    cases = [
        {"name": name, "tp": tp, "pp": pp, "zero": zero, "options": OPTIONS[options]}
        | {"flags": FLAGS, "load": str(checkpoint), "size": SIZE}
        | {"samples": [(sample.ids, sample.answer_start) for sample in samples]}
        for name, (tp, pp, zero, options) in CASES[ranks].items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(ranks, WORKER, str(tmp_path / "cases.json"), str(tmp_path))
    for name, (*_, options) in CASES[ranks].items():
        reader = CheckpointReader(checkpoint)
        alone = SampleGradients(reader, config, None, torch.float64, SIZE, 5, *OPTIONS[options])
        expected = alone.sketch(samples).numpy()
        for rank in range(ranks):
            found = np.load(tmp_path / f"{name}-{rank}.npy")
            error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert error.max() < 1e-12, (name, rank, error)

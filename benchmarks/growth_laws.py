"""The laws of growth as a table: for each axis and init, how far the logits move and what gradients reach.

    PYTHONPATH=. python benchmarks/growth_laws.py

Checkpoints with random weights and moments are grown by the library and checked by the equations of
`tests/support/reference.py` in float64, as in `tests/growth/test_laws.py`, which asserts what this prints.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import GrowthRequest
from megatron_nexus.growth.settings import GrowthConfig
from megatron_nexus.spec.growth_rule import Fill, Init
from tests.support import checkpoints, reference

QWEN3 = {
    "projection": "linear",
    "nexus_m": 0,
    "nexus_a": 0,
    "num_query_groups": 1,
    "qk_layernorm": True,
}
MODELS: dict[str, dict[str, object]] = {"Nexusformer": {}, "Qwen3": QWEN3}
STEPS, RATE = 3, 0.1


def row(folder: Path, model: str, axes: str, init: Init) -> str:
    """A line of the table: grow, compare logits, take a few steps, and grow after and before resharding."""
    config = checkpoints.configure(**MODELS[model])
    sizes = checkpoints.sizes_of_recipe(config, axes, init)
    settings: dict[str, Any] = {"init": init}
    if "num_layers" in sizes:
        settings["depth_init"] = "copy" if init in ("split", "pairs") else "random"
    source = checkpoints.write_checkpoint(folder / "old", config)
    made, after = checkpoints.grow(source, folder / "new", config, sizes, **settings)
    tokens = checkpoints.sample(config.model)
    before = reference.logits(checkpoints.weights(source), tokens, dataclasses.asdict(config.model))
    w = {name: t.requires_grad_() for name, t in checkpoints.weights(made).items()}
    with torch.no_grad():
        logits = reference.logits(w, tokens, dataclasses.asdict(after.model))
    error = float((logits[..., : config.model.vocab_size] - before).abs().max())

    reached = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in w.items()}
    tokens = torch.arange(after.model.vocab_size).repeat(2).view(-1, 2).T.contiguous()
    for _ in range(STEPS):
        loss = reference.loss(w, tokens, tokens.roll(-1, 1), dataclasses.asdict(after.model))
        gradients = torch.autograd.grad(loss, list(w.values()))
        with torch.no_grad():
            for (name, t), gradient in zip(w.items(), gradients, strict=True):
                reached[name] |= gradient != 0
                t -= RATE * gradient
    new = trained = 0
    plan = plan_growth(config, GrowthRequest(sizes, GrowthConfig(**settings)))
    for name, tensor in plan.tensors.items():
        for block in tensor.boxes:
            if block.fill is not Fill.KEPT:
                part = tuple(slice(o, o + s) for o, s in zip(block.box.offsets, block.box.sizes, strict=True))
                new += reached[name][part].numel()
                trained += int(reached[name][part].sum())

    split, _ = checkpoints.grow(source, folder / "split", config, {}, pp=2)
    first, _ = checkpoints.grow(split, folder / "first", config, sizes, **settings, pp=2)
    second, _ = checkpoints.grow(made, folder / "second", after, {}, pp=2)
    same = all(
        np.array_equal(values, checkpoints.tensors(second, state)[name])
        for state in STATES
        for name, values in checkpoints.tensors(first, state).items()
    )
    return f"| {model} | {axes} | {init} | {error:.1e} | {trained:,} of {new:,} | {'yes' if same else 'NO'} |"


def main() -> None:
    """Print the table."""
    print("| model | axes | init | largest change of a logit | new elements reached in 3 steps | commutes |")
    print("|---|---|---|---:|---:|---|")
    for model in MODELS:
        for axes in checkpoints.AXES:
            if model == "Qwen3" and axes in ("M", "A", "M-A"):
                continue
            for init in ("out_rand", "in_rand", "split", "pairs", "zero"):
                with tempfile.TemporaryDirectory() as folder:
                    print(row(Path(folder), model, axes, init), flush=True)


if __name__ == "__main__":
    main()

"""The laws of growth as a table: for each axis and init, how far the logits move and what gradients reach.

    PYTHONPATH=.:tests:tests/growth python benchmarks/growth_laws.py

Checkpoints with random weights and moments are grown by the library and judged by the equations of
`tests/reference.py` in float64, as `tests/growth/test_laws.py` does; the tests assert what is printed here.
"""

import dataclasses
import tempfile
from pathlib import Path

import grown
import numpy as np
import reference
import torch

from megatron_nexus.checkpoint.store import STATES
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import GrowthConfig, GrowthRequest
from megatron_nexus.spec.grow import Fill, Init

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
    config = grown.configure(**MODELS[model])
    sizes = grown.sizes_for(config, axes)
    source = grown.write_checkpoint(folder / "old", config)
    made, after = grown.grow(source, folder / "new", config, sizes, init=init)
    tokens = grown.sample(config.model)
    before = reference.logits(grown.weights(source), tokens, dataclasses.asdict(config.model))
    w = {name: t.requires_grad_() for name, t in grown.weights(made).items()}
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
    plan = plan_growth(config, GrowthRequest(sizes, GrowthConfig(init=init)))
    for name, tensor in plan.tensors.items():
        for block in tensor.boxes:
            if block.fill is not Fill.KEPT:
                part = tuple(slice(o, o + s) for o, s in zip(block.box.offsets, block.box.sizes, strict=True))
                new += reached[name][part].numel()
                trained += int(reached[name][part].sum())

    split, _ = grown.grow(source, folder / "split", config, {}, pp=2)
    first, _ = grown.grow(split, folder / "first", config, sizes, init=init, pp=2)
    second, _ = grown.grow(made, folder / "second", after, {}, pp=2)
    same = all(
        np.array_equal(values, grown.tensors(second, state)[name])
        for state in STATES
        for name, values in grown.tensors(first, state).items()
    )
    return f"| {model} | {axes} | {init} | {error:.1e} | {trained:,} of {new:,} | {'yes' if same else 'NO'} |"


def main() -> None:
    """Print the table."""
    print("| model | axes | init | largest change of a logit | new elements reached in 3 steps | commutes |")
    print("|---|---|---|---:|---:|---|")
    for model in MODELS:
        for axes in grown.AXES:
            if model == "Qwen3" and axes in ("M", "A", "M-A"):
                continue
            for init in ("out_rand", "in_rand", "zero"):
                with tempfile.TemporaryDirectory() as folder:
                    print(row(Path(folder), model, axes, init), flush=True)


if __name__ == "__main__":
    main()

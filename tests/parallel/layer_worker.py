"""One rank of the float64 layer tests: layers over t ranks against the same layers over one.

Every case compares the output and the gradients of the input and of every parameter, assembled over ranks,
with the equations of `reference` on the whole tensors. Writes the largest error of each case.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.models.attention import Attention
from megatron_nexus.models.decoder import DecoderStage, Loss, compile_blocks
from megatron_nexus.models.feed_forward import FeedForward
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.models.rotary import Tables, stage_tables
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.parallel.world import read_world
from megatron_nexus.spec.initialise import logical_values
from megatron_nexus.spec.param import Constant
from megatron_nexus.spec.shard import Box, Shard
from tests.support import reference
from tests.support.waiting import TIMEOUT_S

SEED = 5
# No width divides by 2 or 4, so every split axis is padded.
SIZES = {"vocab_size": 61, "num_layers": 2, "hidden_size": 20, "num_attention_heads": 4, "kv_channels": 6}
WIDTHS = {"ffn_hidden_size": 27, "nexus_m": 21, "nexus_a": 30, "init_method_std": 0.3}


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The logical tensors of a module's parameters, float64, ready for autograd."""
    return {
        name: torch.from_numpy(logical_values(spec, SEED, Box((0,) * len(spec.axes), spec.shape)))
        .double()
        .requires_grad_()
        for name, (spec, _) in logical_parameters(module).items()
    }


def open_gates(module: nn.Module, shard: Shard, weights: dict[str, Tensor]) -> None:
    """Give gates, which are zeros at first, the same values in both."""
    for name, (spec, parameter) in logical_parameters(module).items():
        if spec.init == Constant(0.0):
            values, ((offset,), (size,)) = (
                torch.linspace(0.3, 1.2, spec.numel),
                vars(shard.box(spec)).values(),
            )
            weights[name].data = values.double()
            parameter.data = weights[name].data[offset : offset + size].clone()


def error(mine: Tensor, expected: Tensor) -> float:
    return (
        float((mine - expected).abs().max() / max(1.0, float(expected.abs().max()))) if mine.numel() else 0.0
    )


def compare(
    module: nn.Module, shard: Shard, outputs: list[tuple[Tensor, Tensor]], weights: dict[str, Tensor]
) -> float:
    """The largest error of `outputs` (mine, expected) and of this rank's part of every gradient."""
    worst = max(error(mine.detach(), expected.detach()) for mine, expected in outputs)
    for name, (spec, parameter) in logical_parameters(module).items():
        box = shard.box(spec)
        grad, expected = parameter.grad, weights[name].grad
        assert grad is not None and expected is not None, name
        inside = tuple(slice(0, size) for size in box.sizes)
        part = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        worst = max(worst, error(grad[inside], expected[part]))
        padding = grad.clone()
        padding[inside] = 0.0
        assert not padding.any(), f"{name}: padding has a gradient"
    return worst


def my_tokens(x_TBD: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's share of the tokens under sequence parallelism, all of them otherwise."""
    return x_TBD.chunk(tp.size)[tp.rank] if tp.sequence_parallel else x_TBD


def residual_layer(
    context: LayerContext,
    layer: nn.Module,
    equation: Callable[[Tensor, dict[str, Tensor]], Tensor],
    *more: Tables,
) -> float:
    """A layer [T, B, D], `more` -> [T, B, D] against its equation on [B, T, D]."""
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(3, 8, SIZES["hidden_size"], dtype=torch.float64, generator=generator)
    g_BTD = torch.randn(3, 8, SIZES["hidden_size"], dtype=torch.float64, generator=generator)
    x_ref = x_BTD.clone().requires_grad_()
    weights = whole(layer)
    open_gates(layer, context.shard, weights)
    expected = equation(x_ref, weights)
    expected.backward(g_BTD)
    x = my_tokens(x_BTD.transpose(0, 1), context.tp).contiguous().requires_grad_()
    y = layer(x, *more)
    y.backward(my_tokens(g_BTD.transpose(0, 1), context.tp))
    assert x.grad is not None and x_ref.grad is not None
    pairs = [(y, expected.transpose(0, 1)), (x.grad, x_ref.grad.transpose(0, 1))]
    return compare(
        layer, context.shard, [(mine, my_tokens(full, context.tp)) for mine, full in pairs], weights
    )


def decoder(model: ModelConfig, context: LayerContext) -> float:
    """Embedding to loss."""
    tokens = torch.randint(0, model.vocab_size, (3, 9), generator=torch.Generator().manual_seed(2))
    stage = DecoderStage(model, range(model.num_layers + 2), context)
    weights = whole(stage)
    open_gates(stage, context.shard, weights)
    expected = reference.loss(weights, tokens[:, :-1], tokens[:, 1:], vars(model))
    expected.backward()
    loss = Loss(model, context.tp, context.shard)(stage(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    return compare(stage, context.shard, [(loss, expected)], weights)


def compiled(model: ModelConfig, context: LayerContext) -> float:
    """Compiled blocks against eager ones, to the bit: infinite where two losses or gradients differ."""
    tokens = torch.randint(0, model.vocab_size, (3, 9), generator=torch.Generator().manual_seed(2))
    stages = [DecoderStage(model, range(model.num_layers + 2), context) for _ in range(2)]
    backend = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compile_blocks(stages[1], backend)
    losses = [
        Loss(model, context.tp, context.shard)(stage(tokens[:, :-1]), tokens[:, 1:]) for stage in stages
    ]
    for loss in losses:
        loss.backward()
    assert backend.frame_count == 1, f"{backend.frame_count} compilations of {model.num_layers} layers alike"
    eager, other = ([p.grad for p in stage.parameters()] for stage in stages)
    same = torch.equal(*losses) and all(torch.equal(a, b) for a, b in zip(eager, other, strict=True))
    return 0.0 if same else float("inf")


def run_case(mesh: Mesh, case: dict) -> float:
    model = ModelConfig(**SIZES, **WIDTHS, **case["model"])
    tp = TensorParallel(mesh.tp_group, case["sequence_parallel"])
    shard = Shard(mesh.tp_rank, mesh.tp_size, case["multiple"])
    grouped = case.get("grouped", False)
    context = LayerContext(tp, shard, SEED, torch.float64, case["recompute"], group_projections=grouped)

    def attention(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return reference.block(reference.attention, x, w, "a", vars(model))

    def feed_forward(x: Tensor, w: dict[str, Tensor]) -> Tensor:
        return reference.block(reference.feed_forward, x, w, "f", vars(model))

    match case["layer"]:
        case "attention":
            layer = Attention(model, "a", context)
            tables = stage_tables(model, 8, torch.zeros((), dtype=torch.float64))
            return residual_layer(context, layer, attention, tables)
        case "feed_forward":
            return residual_layer(context, FeedForward(model, "f", context), feed_forward)
        case "compiled":
            return compiled(model, context)
        case _:
            return decoder(model, context)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = read_world(os.environ)
    mesh = make_mesh(world, tp_size=world.size, pp_size=1, timeout_s=TIMEOUT_S)
    errors = {case["name"]: run_case(mesh, case) for case in cases}
    (out / f"errors_{world.size}_{world.rank}.json").write_text(json.dumps(errors))
    close_mesh()


if __name__ == "__main__":
    main()

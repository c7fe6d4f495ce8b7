"""One rank that records cases, some with a fault planted in the real layers.

Usage: recording_worker.py CASES.json OUT_FOLDER; the launcher's variables come from the environment.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from megatron_nexus.comparison.record_steps import RecordSettings, record_steps
from megatron_nexus.config.command_line import build
from megatron_nexus.config.rules import check
from megatron_nexus.models.attention import Attention
from megatron_nexus.models.feed_forward import FeedForward
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.parallel.world import read_world
from megatron_nexus.spec import initialise
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box
from megatron_nexus.training import gradient_reducer, loop
from tests.support.warm_server import call_in_fork

SAMPLES = 3
RANK_BATCHES = loop.rank_batches
DRAW = initialise.logical_values


class NoSum(TensorParallel):
    """Whose row-parallel products are not summed over ranks."""

    def leave(self, partial: Tensor) -> Tensor:
        return partial


class NoGradientSum(TensorParallel):
    """Whose gradients of what all ranks read are not summed over ranks."""

    def enter(self, x: Tensor) -> Tensor:
        return x


def without_a_sum(kind: type[TensorParallel]) -> Callable[[nn.Module], None]:
    def plant(module: nn.Module) -> None:
        module.tp = kind(module.tp._group)

    return plant


def wrong_scale(attention: nn.Module) -> None:
    attention.score_scale *= 1.5


def swapped_heads(attention: nn.Module) -> None:
    def swap(module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, *rest = outputs
        q = q.unflatten(-1, (-1, attention.head_size)).flip(-2).flatten(-2) if attention.tp.rank == 1 else q
        return (q, *rest)

    attention.qkv.register_forward_hook(swap)


def dropout(attention: nn.Module) -> None:
    """Whose draws are of each rank's own, as where ranks that hold the same share no generator."""
    draws = torch.Generator().manual_seed(1 + attention.tp.rank)

    def drop(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output * (torch.rand(output.shape, generator=draws) > 0.1) / 0.9

    attention.register_forward_hook(drop)


def detached(feed_forward: nn.Module) -> None:
    feed_forward.inner.register_forward_hook(lambda module, inputs, outputs: (outputs[0].detach(),))


IN_LAYER_1: dict[str, tuple[type[nn.Module], Callable[[nn.Module], None]]] = {
    "no sum": (FeedForward, without_a_sum(NoSum)),
    "no gradient sum": (Attention, without_a_sum(NoGradientSum)),
    "no gradient": (FeedForward, detached),
    "dropout": (Attention, dropout),
    "wrong scale": (Attention, wrong_scale),
    "swapped heads": (Attention, swapped_heads),
}


def same_draw(spec: ParamSpec, seed: int, box: Box) -> np.ndarray:
    """Every layer draws the values of the first, as from a generator that does not know its layer."""
    first = dataclasses.replace(spec, name=spec.name.replace("layers.1.", "layers.0."))
    return DRAW(first, seed, box)


def stale_samples(config: object, mesh: object, samples: object, consumed: int) -> Iterator:
    """The micro-batches of one step again and again."""
    batches = RANK_BATCHES(config, mesh, samples, consumed)
    read = [next(batches) for _ in range(config.accumulation_steps(mesh.world_size))]
    while True:
        yield from read


class SumReduction(gradient_reducer.MeanReduction):
    """The sum over data-parallel ranks, not the mean."""

    def finish(self) -> None:
        super().finish()
        self._partition.mul_(self._ranks)


ELSEWHERE = {
    "same draw": (initialise, "logical_values", same_draw),
    "stale samples": (loop, "rank_batches", stale_samples),
    "summed gradients": (gradient_reducer, "MeanReduction", SumReduction),
}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Nothing, or a fault in the real code, of layer 1 where it is one of a layer."""
    if not fault:
        yield
    elif fault in ELSEWHERE:
        with mock.patch.object(*ELSEWHERE[fault]):
            yield
    else:
        kind, plant = IN_LAYER_1[fault]
        make = kind.__init__

        def make_wrong(self: nn.Module, model: object, prefix: str, *rest: object) -> None:
            make(self, model, prefix, *rest)
            if prefix.startswith("layers.1."):
                plant(self)

        with mock.patch.object(kind, "__init__", make_wrong):
            yield


def run_case(case: dict, out: Path, index: int) -> None:
    config, world = build(case["flags"]), read_world(os.environ)
    world = dataclasses.replace(world, master_port=world.master_port + index)
    check(config, world.size)
    settings = RecordSettings(out / case["name"], case["steps"], SAMPLES, float64=True)
    with planted(case.get("fault", "")):
        record_steps(config, world, None, settings)


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for index, case in enumerate(cases):
        call_in_fork(run_case, case, out, index)


if __name__ == "__main__":
    main()

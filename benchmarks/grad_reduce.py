"""Data-parallel traffic of ZeRO 1: bytes sent a step, and the share of it that the backward pass hides.

    PYTHONPATH=. python benchmarks/grad_reduce.py            # two gloo ranks on this machine
    PYTHONPATH=. python benchmarks/grad_reduce.py --predict  # a cluster, by a model: no measurement

Three engines take their steps in turn in one run: gradients all-reduced by DeepSpeed after the last
backward pass, reduce-scattered after it, and reduce-scattered by buckets during it. All figures are ratios.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus import log
from megatron_nexus.config.command_line import build
from megatron_nexus.config.presets import Value
from megatron_nexus.parallel.local_ranks import run_local_ranks
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.machine import set_num_threads, tune_malloc

RANKS, ROUNDS = 2, 24
MODEL: dict[str, Value] = {
    "precision": "bf16",
    "vocab_size": 8000,
    "num_layers": 8,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "kv_channels": 64,
    "ffn_hidden_size": 1024,
    "nexus_m": 448,
    "nexus_a": 512,
    "seq_length": 256,
    "micro_batch_size": 2,
    "global_batch_size": 8,
}
DEEPSPEED = {"zero_optimization": {"contiguous_gradients": True}}
"""A setting of DeepSpeed's own reduction leaves it to DeepSpeed."""
WAYS: dict[str, dict[str, Value]] = {
    "all-reduce by DeepSpeed": {},
    "reduce-scatter after the pass": {"overlap_grad_reduce": False},
    "reduce-scatter during the pass": {"ddp_bucket_size": 1_500_000},
}


class Traffic:
    """Bytes that a rank sends to sum gradients, and the calls: a ring's all-reduce sends twice."""

    def __init__(self) -> None:
        self.bytes = self.calls = 0
        self._wrap("all_reduce", 2, 0)
        self._wrap("all_to_all_single", 1, 1)

    def _wrap(self, name: str, times: int, operand: int) -> None:
        real: Callable[..., object] = getattr(dist, name)

        def counted(*arguments: Tensor, **options: Any) -> object:
            x = arguments[operand] if arguments else options["tensor"]
            if x.numel() > 1000:  # not a loss or a norm
                self.bytes += times * x.numel() * x.element_size() * (RANKS - 1) // RANKS
                self.calls += 1
            return real(*arguments, **options)

        setattr(dist, name, counted)


def random_batches(vocab_size: int, micro_batch: int, seq_length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of random tokens for ever."""
    while True:
        ids = torch.randint(0, vocab_size, (micro_batch, seq_length + 1))
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def measure(folder: Path) -> None:
    """One rank: seconds of each way's steps and of its waits, bytes and calls; rank 0 prints the table."""
    from megatron_nexus.training.engine import Engine

    mesh = make_mesh(read_world(os.environ), 1, 1)
    set_num_threads(mesh)
    tune_malloc()
    traffic, engines, batches = Traffic(), {}, {}
    waited = 0.0
    for name, flags in WAYS.items():
        file = {} if flags else {"deepspeed_config": str(folder / "deepspeed.json")}
        config = build({**MODEL, **flags, **file})
        engine = engines[name] = Engine(config, mesh)
        training = config.training
        batches[name] = random_batches(
            config.model.vocab_size, training.micro_batch_size, training.seq_length
        )
        reduce = engine.deepspeed.buffered_allreduce_fallback

        def timed(*, real: Callable[..., None] = reduce, **options: object) -> None:
            nonlocal waited
            began = time.perf_counter()
            real(**options)
            waited += time.perf_counter() - began

        engine.deepspeed.buffered_allreduce_fallback = timed
    seen: dict[str, list[tuple[float, float, int, int]]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS + 2):
        for name, engine in engines.items():
            dist.barrier()
            traffic.bytes = traffic.calls = 0
            waited, began = 0.0, time.perf_counter()
            engine.train_step(batches[name], 1e-4)
            seen[name].append((time.perf_counter() - began, waited, traffic.bytes, traffic.calls))
    if mesh.rank == 0:
        parameters = sum(p.numel() for _, p in engine.parameters.values())
        print(f"{parameters / 1e6:.1f}M parameters, {RANKS} ranks, medians of {ROUNDS} steps of each way\n")
        report({name: steps[2:] for name, steps in seen.items()}, parameters)
    close_mesh()


def report(seen: dict[str, list[tuple[float, float, int, int]]], parameters: int) -> None:
    """Print a line for each way; times are shares of the first two's."""
    first, alone = (list(seen.values())[index] for index in (0, 1))
    print("| gradients | bytes sent a parameter | calls | step / first | exposed / step | hidden |")
    print("|---|" + "---:|" * 5)
    for name, steps in seen.items():
        step = statistics.median(a[0] / b[0] for a, b in zip(steps, first, strict=True))
        exposed = statistics.median(waited / step_s for step_s, waited, *_ in steps)
        hidden = 1 - statistics.median(a[1] / b[1] for a, b in zip(steps, alone, strict=True))
        *_, sent, calls = steps[0]
        share = f"{100 * hidden:.0f} %" if steps is not first else ""
        print(
            f"| {name} | {sent / parameters:.2f} | {calls} | {step:.2f} | {100 * exposed:.0f} % | {share} |"
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """A row of nanotron's published grid: 1.34B parameters, a million tokens a step, 8 H100 a node."""

    nodes: int
    dp: int
    tp: int
    pp: int
    published: float


GRID = [
    Layout(1, 4, 1, 2, 44.3),
    Layout(2, 8, 1, 2, 41.6),
    Layout(4, 16, 1, 2, 38.4),
    Layout(8, 32, 1, 2, 32.5),
    Layout(16, 64, 2, 1, 29.5),
    Layout(32, 64, 4, 1, 23.2),
]
PARAMETERS, TOKENS, PEAK, LINK = 1.34e9, 1.05e6, 989e12, 35e9
"""Bytes a second of a GPU between nodes; within one, traffic is taken as free."""
MFU_OF_A_NODE, SAMPLES, BUCKET = 0.443, 256, 40e6


def predict() -> None:
    """Print the MFU that the one-constant model gives with today's and with the new reduction."""
    flops = 6 * PARAMETERS * TOKENS * 1.2
    print("| GPUs | dp, tp, pp | published | all-reduced in fp32 | reduce-scattered after | during |")
    print("|---:|---|---:|---:|---:|---:|")
    for row in GRID:
        gpus, micro_batches = 8 * row.nodes, SAMPLES // row.dp
        bubble = 1 + (row.pp - 1) / micro_batches
        compute = flops / gpus / PEAK / (MFU_OF_A_NODE * (1 + 1 / 32))
        share = (row.dp - 1) / row.dp * PARAMETERS / (row.tp * row.pp) / LINK * (row.nodes > 1)
        # The last backward pass hides all but the last bucket, as far as it is long enough.
        backward = 2 / 3 * compute / micro_batches
        last = 4 * share * min(1.0, BUCKET * row.tp * row.pp / PARAMETERS)
        hidden = min(backward, 4 * share - last)
        times = [compute * bubble + share * 10, compute * bubble + share * 6]
        times.append(times[1] - hidden)
        cells = [f"{100 * flops / gpus / PEAK / seconds:.1f}" for seconds in times]
        print(
            f"| {gpus} | {row.dp}, {row.tp}, {row.pp} | {row.published} | {' | '.join(cells)} |", flush=True
        )


def main() -> None:
    """Measure on local ranks, or predict."""
    if "--predict" in sys.argv:
        predict()
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    log.configure(is_main_rank=True)
    with tempfile.TemporaryDirectory(prefix="grad-reduce-") as folder:
        Path(folder, "deepspeed.json").write_text(json.dumps(DEEPSPEED))
        assert run_local_ranks(RANKS, [__file__, "--rank", folder]) == 0, "a rank failed"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        measure(Path(sys.argv[2]))
    else:
        main()

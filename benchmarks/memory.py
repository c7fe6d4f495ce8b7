"""Memory of real runs beside the plan that `--dry-run` prints.

    PYTHONPATH=. python benchmarks/memory.py

Each case starts its ranks on this machine. A rank first takes two steps of a tiny model, so that libraries
are loaded, and notes its resident memory; then it builds the engine of the case, takes three steps and
notes how far its resident memory has risen above that. README.md says more.
"""

import dataclasses
import gc
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_nexus import log
from megatron_nexus.config.command_line import build
from megatron_nexus.config.presets import Value
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.parallel.local_ranks import run_local_ranks
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.machine import keep_freed_memory, padding_multiple, share_cores
from megatron_nexus.training.memory_plan import plan_memory

MIB = 2**20
STEPS = 3
MODEL: dict[str, Value] = {
    "vocab_size": 16000,
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "ffn_hidden_size": 1536,
    "nexus_m": 640,
    "nexus_a": 768,
    "seq_length": 256,
    "micro_batch_size": 2,
    "global_batch_size": 4,
}
TINY: dict[str, Any] = {
    "vocab_size": 160,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 8,
    "kv_channels": 2,
}
CASES: list[tuple[str, int, dict[str, Value]]] = [
    ("fp32", 1, {"precision": "fp32"}),
    ("bf16", 1, {"precision": "bf16"}),
    ("tp 2, fp32", 2, {"precision": "fp32", "tensor_model_parallel_size": 2}),
    (
        "tp 2, sequence parallel, fp32",
        2,
        {"precision": "fp32", "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    ("pp 2, bf16", 2, {"precision": "bf16", "pipeline_model_parallel_size": 2}),
    (
        "tp 2, pp 2, bf16",
        4,
        {"precision": "bf16", "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ),
    ("dp 2, ZeRO 1, bf16", 2, {"precision": "bf16"}),
    ("dp 2, ZeRO 1, fp32", 2, {"precision": "fp32"}),
    ("dp 2, ZeRO 2, fp32", 2, {"precision": "fp32", "zero_stage": 2}),
    ("dp 2, ZeRO 3, fp32", 2, {"precision": "fp32", "zero_stage": 3}),
    ("recompute selective, fp32", 1, {"precision": "fp32", "recompute_granularity": "selective"}),
    ("recompute full, fp32", 1, {"precision": "fp32", "recompute_granularity": "full"}),
]


def resident_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (at most) of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024


def random_batches(config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of random tokens for ever."""
    generator = torch.Generator().manual_seed(7)
    shape = (config.training.micro_batch_size, config.training.seq_length + 1)
    while True:
        ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def measure(config: RunConfig, keeps: bool, out: Path) -> None:
    """One rank: what it holds above its level before the engine was built."""
    from megatron_nexus.training.engine import Engine

    world = read_world(os.environ)
    check(config, world.size)
    parallel = config.parallel
    mesh = make_mesh(world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    share_cores(mesh)
    if keeps:
        keep_freed_memory()
    tiny = dataclasses.replace(config, model=dataclasses.replace(config.model, **TINY))
    warm, batches = Engine(tiny, mesh), random_batches(tiny)
    for _ in range(2):
        warm.train_step(batches, 1e-4)
    del warm
    gc.collect()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    engine, batches = Engine(config, mesh), random_batches(config)
    started = resident_bytes("VmRSS") - before
    for _ in range(STEPS):
        engine.train_step(batches, 1e-4)
    peak = resident_bytes("VmHWM") - before
    (out / f"{mesh.rank}.json").write_text(json.dumps({"started": started, "peak": peak}))
    close_mesh()


def main() -> None:
    """Run every case with both allocator settings, and print the table."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    log.configure(speaks=True)
    device = torch.device("cpu")
    wanted = [int(word) for word in sys.argv[1:]] or range(len(CASES))
    print("| run | rank | plan | default allocator | | keeps freed memory | |\n" + "|---|---|" + "---:|" * 5)
    for name, ranks, flags in (CASES[index] for index in wanted):
        config = build({**MODEL, **flags})
        plan = plan_memory(config, ranks, device, padding_multiple(config, device))
        seen: dict[bool, list[dict[str, int]]] = {}
        for keeps in (False, True):
            with tempfile.TemporaryDirectory(prefix="memory-") as folder:
                words = ["--rank", json.dumps({**MODEL, **flags}), str(int(keeps)), folder]
                assert run_local_ranks(ranks, [__file__, *words]) == 0, f"{name} failed"
                seen[keeps] = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(ranks)]
        for rank in range(ranks):
            planned = plan[rank * len(plan) // ranks].peak
            cells = [f"{planned / MIB:,.0f}"]
            for keeps in (False, True):
                peak = seen[keeps][rank]["peak"]
                cells += [f"{peak / MIB:,.0f}", f"{100 * (planned / peak - 1):+.0f} %"]
            print(f"| {name} | {rank} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        measure(build(json.loads(sys.argv[2])), sys.argv[3] == "1", Path(sys.argv[4]))
    else:
        main()

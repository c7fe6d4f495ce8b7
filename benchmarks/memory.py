"""Memory of real runs compared with the plan that `--dry-run` prints.

    PYTHONPATH=. python benchmarks/memory.py

Each case starts its ranks on this machine, once with either setting of the allocator. A rank first takes
two steps of a tiny model, so that libraries are loaded; then it builds the engine of the case, takes three
steps and notes the most that it held above what it held before: by malloc's own account, looked at every
millisecond, and of resident memory. docs/performance.md has the results.
"""

import ctypes
import dataclasses
import gc
import json
import os
import re
import sys
import tempfile
import threading
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
from megatron_nexus.planner.memory import plan_memory
from megatron_nexus.training.machine import set_num_threads, tune_malloc

MIB = 2**20
STEPS = 3
BUCKET = 20_000_000
"""Elements of the buckets of ZeRO 2 and 3: DeepSpeed's 2 GB are more than the model."""
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
WIDE: dict[str, Value] = {
    "precision": "bf16",
    "vocab_size": 131072,
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "kv_channels": 32,
    "seq_length": 512,
    "micro_batch_size": 4,
    "global_batch_size": 8,
}
"""A head as of a large vocabulary: its logits are most of what a step holds."""
LINEAR: dict[str, Value] = {"cross_entropy_fusion_impl": "linear"}
CASES: list[tuple[str, int, dict[str, Value]]] = [
    ("fp32", 1, {"precision": "fp32"}),
    ("bf16", 1, {"precision": "bf16"}),
    ("tp 2, fp32", 2, {"precision": "fp32", "tensor_model_parallel_size": 2}),
    (
        "tp 2, sequence parallel, fp32",
        2,
        {"precision": "fp32", "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    ("pp 2, fp32", 2, {"precision": "fp32", "pipeline_model_parallel_size": 2}),
    (
        "tp 2, pp 2, fp32",
        4,
        {"precision": "fp32", "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
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
    ("dp 2, ZeRO 2, bf16", 2, {"precision": "bf16", "zero_stage": 2}),
    ("dp 2, ZeRO 3, bf16", 2, {"precision": "bf16", "zero_stage": 3}),
    ("recompute selective, fp32", 1, {"precision": "fp32", "recompute_granularity": "selective"}),
    ("recompute full, fp32", 1, {"precision": "fp32", "recompute_granularity": "full"}),
    ("vocabulary of 131,072, bf16", 1, WIDE),
    ("the same, head and loss in one", 1, {**WIDE, **LINEAR}),
    ("vocabulary of 131,072, tp 2, bf16", 2, {**WIDE, "tensor_model_parallel_size": 2}),
    ("the same, head and loss in one", 2, {**WIDE, **LINEAR, "tensor_model_parallel_size": 2}),
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


HEAPS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")


class Mallinfo2(ctypes.Structure):
    """glibc's account of its heaps and of the blocks that it has mapped, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*HEAPS, "keepcost")]


def allocated_bytes() -> int:
    """What malloc has given out and not got back: what torch.cuda.memory_allocated is on a GPU."""
    account = ctypes.CDLL(None).mallinfo2
    account.restype = Mallinfo2
    now = account()
    return int(now.uordblks + now.hblkhd)


class Watch:
    """The most that was allocated, looked at by a thread."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.001):
            self.most = max(self.most, allocated_bytes())

    def end(self) -> int:
        """Stop looking; what was seen."""
        self._ended.set()
        self._thread.join()
        return self.most


def measure(config: RunConfig, tunes_malloc: bool, out: Path) -> None:
    """One rank: the most it holds above its level before the engine was built, allocated and resident."""
    from megatron_nexus.training.engine import Engine

    world = read_world(os.environ)
    check(config, world.size)
    parallel = config.parallel
    mesh = make_mesh(world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    set_num_threads(mesh)
    if tunes_malloc:
        tune_malloc()
    tiny = dataclasses.replace(config, model=dataclasses.replace(config.model, **TINY))
    warm, batches = Engine(tiny, mesh), random_batches(tiny)
    for _ in range(2):
        warm.train_step(batches, 1e-4)
    del warm
    gc.collect()
    before = {"allocated": allocated_bytes(), "resident": resident_bytes("VmRSS")}
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    watch = Watch()
    engine, batches = Engine(config, mesh), random_batches(config)
    for _ in range(STEPS):
        engine.train_step(batches, 1e-4)
    most = {"allocated": watch.end(), "resident": resident_bytes("VmHWM")}
    risen = {what: most[what] - before[what] for what in most}
    (out / f"{mesh.rank}.json").write_text(json.dumps(risen))
    close_mesh()


def run(flags: dict[str, Value], ranks: int, tunes_malloc: bool, folder: Path) -> list[dict[str, int]]:
    """What each rank of a case has measured."""
    words = ["--rank", json.dumps(flags), str(int(tunes_malloc)), str(folder)]
    assert run_local_ranks(ranks, [__file__, *words]) == 0, f"{flags} failed"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """Run every case with both settings of the allocator, and print the table."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    log.configure(is_main_rank=True)
    wanted = [int(word) for word in sys.argv[1:]] or range(len(CASES))
    print(
        "| run | rank | plan | allocated | plan / it | resident | plan / it | resident, mallopt | plan / it |"
    )
    print("|---|---|" + "---:|" * 7)
    for name, ranks, case in (CASES[index] for index in wanted):
        with tempfile.TemporaryDirectory(prefix="memory-") as folder:
            flags = {**MODEL, **case}
            if "zero_stage" in case:
                deepspeed = Path(folder) / "deepspeed.json"
                deepspeed.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
                flags["deepspeed_config"] = str(deepspeed)
            config = build(flags)
            plan = plan_memory(config, ranks, "cpu")
            default, tuned = (run(flags, ranks, tunes, Path(folder)) for tunes in (False, True))
        for rank in range(ranks):
            planned = plan[rank * len(plan) // ranks].peak
            cells = [f"{planned / MIB:,.0f}"]
            for most in (default[rank]["allocated"], default[rank]["resident"], tuned[rank]["resident"]):
                cells += [f"{most / MIB:,.0f}", f"{100 * (planned / most - 1):+.0f} %"]
            print(f"| {name} | {rank} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        measure(build(json.loads(sys.argv[2])), sys.argv[3] == "1", Path(sys.argv[4]))
    else:
        main()

"""One rank whose engine takes three steps; records the bytes of its tensors, the last step's peak included.

Usage: memory_worker.py FLAGS.json OUT_FOLDER; the launcher's variables come from the environment.
"""

import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_nexus.config.command_line import build
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.engine import Engine


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory, each piece counted once."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def random_batches(config: RunConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro-batches of random tokens for ever."""
    generator = torch.Generator().manual_seed(7)
    shape = (config.training.micro_batch_size, config.training.seq_length + 1)
    while True:
        ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def growth(profile: torch.profiler.profile) -> tuple[int, int]:
    """By how much tensor memory grew from the beginning of a profile: at most, and at its end."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak, level


def main() -> None:
    config, out = build(json.loads(sys.argv[1])), Path(sys.argv[2])
    parallel = config.parallel
    mesh = make_mesh(
        read_world(os.environ), parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    )
    engine = Engine(config, mesh)
    batches = random_batches(config)
    for _ in range(2):
        engine.train_step(batches, 1e-4)
    inner = engine.deepspeed.basic_optimizer
    # Stage 3 lends its master weights to the inner optimizer for a step only.
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None) or [
        tensor for group in inner.param_groups for tensor in group["params"]
    ]
    moments = [s[name] for s in inner.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = storage_bytes(o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        engine.train_step(batches, 1e-4)
    peak, end = growth(profile)
    record = {
        "weights": storage_bytes(getattr(p, "ds_tensor", p) for _, p in engine.parameters.values()),
        "optimizer": storage_bytes([*masters, *moments]),
        "peak": held + peak,
        "unseen": end,
    }
    (out / f"{mesh.rank}.json").write_text(json.dumps(record))
    close_mesh()


if __name__ == "__main__":
    main()

"""One rank of the parity tests: trains each given case for a few steps and records what it saw.

Usage: law_worker.py CASES.json OUT_FOLDER; the launcher's variables come from the environment.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_nexus.config.command_line import build
from megatron_nexus.config.rules import check
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.engine import Engine

STEPS = 5


def global_batches(vocab_size: int, samples: int, seq_length: int) -> list[tuple[Tensor, Tensor]]:
    """The same token ids for every topology: STEPS batches of (tokens, labels) [samples, seq_length]."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(0, vocab_size, (samples, seq_length + 1), generator=generator)
        made.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return made


def my_batches(
    batches: list[tuple[Tensor, Tensor]], micro: int, rank: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for tokens, labels in batches:
        for first in range(rank * micro, len(tokens), size * micro):
            yield tokens[first : first + micro], labels[first : first + micro]


def run_case(case: dict, out: Path, index: int) -> None:
    config = build(case["flags"])
    world = read_world(os.environ)
    world = replace(world, master_port=world.master_port + 1 + index)
    check(config, world.size)
    parallel = config.parallel
    mesh = make_mesh(world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, 120.0)
    engine = Engine(config, mesh)
    training = config.training
    batches = global_batches(config.model.vocab_size, training.global_batch_size, training.seq_length)
    mine = my_batches(batches, training.micro_batch_size, mesh.data, mesh.data_size)
    losses, norms = [], []
    for step in range(STEPS):
        result = engine.train_step(mine, config.optimizer.lr)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 0:
            pass
    evaluation = engine.evaluate(
        my_batches(batches[:1], training.micro_batch_size, mesh.data, mesh.data_size),
        config.accumulation_steps(world.size),
    )
    if mesh.rank == 0:
        record = {"losses": losses, "norms": norms, "evaluation": evaluation}
        (out / f"{case['name']}.json").write_text(json.dumps(record))
    close_mesh()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for index, case in enumerate(cases):
        run_case(case, out, index)


if __name__ == "__main__":
    main()

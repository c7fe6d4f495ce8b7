"""A checkpoint of two ranks and one tensor of 5 x 4, written without training."""

from pathlib import Path

import numpy as np

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.checkpoint.data_file import STATES, Chunk, FilePart, write_chunks
from megatron_nexus.checkpoint.manifest import (
    EngineRecord,
    Manifest,
    OptimizerRecord,
    RunProgress,
    Topology,
)
from megatron_nexus.checkpoint.new_checkpoint import new_checkpoint
from megatron_nexus.spec.param import Axis, Layout, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Box

SPEC = ParamSpec("w", (Axis("rows", 5, Layout.SHARDED_PADDED), Axis("columns", 4)), Normal(0.02), Role.MATMUL)
MANIFEST = Manifest(
    progress=RunProgress(step=3, samples=24, tokens=3072, flops=10**25),
    specs={"w": SPEC},
    optimizer=OptimizerRecord(3, {"decay": {"lr": 1 / 3, "betas": [0.9, 0.95]}}),
    engine=EngineRecord(3, 24, 0),
    topology=Topology(world_size=2, pipe_size=1, data_size=1, tensor_size=2),
    config={"model": {"vocab_size": 4096}, "preset": "debug"},
    tokenizer_fingerprint="sha256:0",
    lineage=[{"parent": None, "seed": 1}],
)
OF_FORMAT = {version: Path(__file__).parents[1] / "checkpoint" / f"format_{version}" for version in (2, 3)}
"""The same checkpoint as older format versions wrote it; in version 2 with a grown region."""
# Rank 0 holds the first 11 elements of the flat tensor, rank 1 the other 9.
BOXES = [[Box((0, 0), (2, 4)), Box((2, 0), (1, 3))], [Box((2, 3), (1, 1)), Box((3, 0), (2, 4))]]
VALUES = {state: np.random.default_rng(i).random((5, 4), np.float32) for i, state in enumerate(STATES)}


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))


def write(root: Path, step: int = 3, boxes: list[list[Box]] = BOXES, per_file: int = 1) -> Path:
    """Write a checkpoint, `per_file` ranks to a data file, the last rank first."""
    chunks = [[Chunk("w", state, box) for box in of_rank for state in STATES] for of_rank in boxes]
    ranks = [FilePart(rank, of_rank, {"cpu": bytes([rank])}) for rank, of_rank in enumerate(chunks)]
    with new_checkpoint(root, step, SingleProcess()) as checkpoint:
        records = []
        for rank in reversed(range(len(boxes))):
            first = rank // per_file * per_file
            values = (VALUES[p.state][slices(p.box)] for p in chunks[rank])
            parts = ranks[first : first + per_file]
            records.insert(0, write_chunks(checkpoint.folder, parts, values, rank - first))
        checkpoint.finish(MANIFEST, records)
    return checkpoint.path

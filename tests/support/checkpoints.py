"""Checkpoints for the growth tests: written without training, grown by the library, read back whole."""

import dataclasses
import functools
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.checkpoint.chunks import fragment_boxes, full_box, index_within
from megatron_nexus.checkpoint.data_file import STATES, Chunk, FilePart, write_chunks
from megatron_nexus.checkpoint.manifest import (
    MANIFEST_FILE,
    EngineRecord,
    JsonObject,
    Manifest,
    OptimizerRecord,
    RunProgress,
    Topology,
)
from megatron_nexus.checkpoint.new_checkpoint import new_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.command_line import build
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.growth.apply import grow_checkpoint
from megatron_nexus.growth.division import UNITS
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import GrowthRequest
from megatron_nexus.growth.settings import GrowthConfig
from megatron_nexus.growth.worker_group import WorkerGroup
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.initialise import logical_values
from megatron_nexus.spec.param import Constant, Normal
from megatron_nexus.spec.shard import Shard

STEP = 40
GROUP = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
SIZES = {
    "vocab_size": 37,
    "num_layers": 2,
    "hidden_size": 12,
    "num_attention_heads": 2,
    "kv_channels": 4,
    "ffn_hidden_size": 17,
    "nexus_m": 15,
    "nexus_a": 19,
    "init_method_std": 0.3,
}
# Every axis alone, widths together, heads in both ways, and everything at once.
AXES: dict[str, dict[str, int]] = {
    "M": {"nexus_m": 22},
    "A": {"nexus_a": 26},
    "M-A": {"nexus_m": 21, "nexus_a": 30},
    "FFN": {"ffn_hidden_size": 23},
    "D": {"hidden_size": 14},
    "heads": {"num_attention_heads": 3},
    "head-dim": {"kv_channels": 7},
    "heads-head-dim": {"num_attention_heads": 3, "kv_channels": 6},
    "depth": {"num_layers": 4},
    "vocabulary": {"vocab_size": 41},
    "all": {
        "vocab_size": 41,
        "num_layers": 3,
        "hidden_size": 14,
        "num_attention_heads": 3,
        "kv_channels": 6,
        "ffn_hidden_size": 23,
        "nexus_m": 21,
        "nexus_a": 30,
    },
}


def sizes_for(config: RunConfig, axes: str) -> dict[str, int]:
    """The sizes of `AXES` for a model of any kind: M and A, slots in their place, or none; heads and keys."""
    sizes = dict(AXES[axes])
    if config.model.projection != "nexus":
        sizes = {name: size for name, size in sizes.items() if not name.startswith("nexus")}
    if config.model.projection == "pattention" and sizes != AXES[axes]:
        sizes["pattention_slots"] = config.model.pattention_slots + 7
    if config.model.feed_forward == "nexus" and "ffn_hidden_size" in sizes:
        sizes["ffn_nexus_m"] = config.model.ffn_nexus_m + 6
    if config.model.num_query_groups and "num_attention_heads" in sizes:
        share = config.model.num_attention_heads // config.model.num_query_groups
        sizes |= {"num_attention_heads": 4, "num_query_groups": 4 // share}
    return sizes


def sizes_of_recipe(config: RunConfig, axes: str, init: str) -> dict[str, int]:
    """`sizes_for`, as a recipe that divides outgoing weights takes them: twice the old, or an even number."""
    sizes, model = sizes_for(config, axes), config.model
    for name, size in sizes.items():
        old = model.query_groups if name == "num_query_groups" else getattr(model, name)
        slots = name == "pattention_slots" or (name, model.feed_forward) == ("ffn_hidden_size", "pattention")
        if init == "split" and (slots or name == "hidden_size"):
            sizes[name] = 2 * old
        elif init == "pairs" and name in UNITS:
            sizes[name] = size + (size - old) % 2
    if "num_query_groups" in sizes:
        share = model.num_attention_heads // model.query_groups
        sizes["num_attention_heads"] = share * sizes["num_query_groups"]
    return sizes


def configure(**options: object) -> RunConfig:
    return build({**SIZES, "micro_batch_size": 1, "global_batch_size": 4, **options})


def write_checkpoint(
    root: Path,
    config: RunConfig,
    tp: int = 1,
    seed: int = 7,
    chunk_elements: int = 200,
    step: int = STEP,
    lineage: Sequence[JsonObject] = (),
) -> Path:
    """A checkpoint with random weights and moments as `tp` ranks would write it."""
    specs = decoder_specs(config.model)
    whole = {}
    for name, spec in specs.items():
        for i, state in enumerate(STATES):
            # Gates too, which are zeros at first.
            init = Normal(0.5) if spec.init == Constant(0.0) else spec.init
            drawn = dataclasses.replace(spec, name=f"{name} {state}", init=init)
            values = logical_values(drawn, seed + i, full_box(spec.shape))
            whole[name, state] = np.abs(values) if state == "exp_avg_sq" else values
    groups = {"decay": GROUP, "no_decay": {**GROUP, "weight_decay": 0.0}}
    if all(spec.decays for spec in specs.values()):  # a model without gains
        del groups["no_decay"]
    manifest = Manifest(
        progress=RunProgress(step, 4 * step, 100 * step, 10**9),
        specs=specs,
        optimizer=OptimizerRecord(step, groups),
        engine=EngineRecord(step, 4 * step, 0),
        topology=Topology(tp, 1, 1, tp),
        config=dataclasses.asdict(config),
        tokenizer_fingerprint="",
        lineage=lineage,
    )
    with new_checkpoint(root, step, SingleProcess()) as checkpoint:
        records = []
        for rank in range(tp):
            shard = Shard(rank, tp)
            chunks = [
                Chunk(name, state, part.box)
                for name, spec in specs.items()
                if spec.is_sharded or rank == 0
                for state in STATES
                for part in fragment_boxes(spec, shard, 0, prod(shard.local_shape(spec)), most=chunk_elements)
            ]
            arrays = (
                whole[p.tensor, p.state][index_within(p.box, full_box(specs[p.tensor].shape))] for p in chunks
            )
            part = FilePart(rank, chunks, {"cpu": b"random"})
            records.append(write_chunks(checkpoint.folder, [part], arrays))
        checkpoint.finish(manifest, records)
    return checkpoint.path


def grow(
    source: Path,
    root: Path,
    config: RunConfig,
    sizes: dict[str, int],
    tp: int = 1,
    pp: int = 1,
    workers: int = 1,
    **settings: object,
) -> tuple[Path, RunConfig]:
    """Grow a checkpoint through the library; the new one and its configuration."""
    plan = plan_growth(config, GrowthRequest(sizes, GrowthConfig(**settings)))
    parallel = dataclasses.replace(
        plan.after.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
    plan = dataclasses.replace(plan, after=dataclasses.replace(plan.after, parallel=parallel))
    return grow_checkpoint(plan, source, root, WorkerGroup(SingleProcess(), workers)), plan.after


def tensors(folder: Path, state: str = "fp32") -> dict[str, np.ndarray]:
    """All logical tensors of a checkpoint, which is verified first."""
    reader = _verified(folder, (folder / MANIFEST_FILE).stat().st_mtime_ns)
    return {n: reader.read_box(n, state, full_box(s.shape)) for n, s in reader.manifest.specs.items()}


@functools.lru_cache(maxsize=2)
def _verified(folder: Path, written_ns: int) -> CheckpointReader:
    reader = CheckpointReader(folder)
    reader.verify()
    return reader


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint in float64, for `reference`."""
    return {name: torch.from_numpy(values).double() for name, values in tensors(folder).items()}


def sample(model: ModelConfig) -> Tensor:
    """Token ids [2, 9]."""
    return torch.randint(0, model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))

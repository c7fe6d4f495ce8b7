"""Write the grown checkpoint: data files chunk by chunk, by all workers, in bounded memory.

The files are laid out as the ranks of the target topology would write them. Their headers and lengths
are known beforehand, so any worker can write any chunk. The folder gets its name last:
an interrupted growth leaves nothing; after a kill, which nothing can tidy, the next growth or run that saves
there removes the temporary folder.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from math import isfinite, prod
from operator import attrgetter
from pathlib import Path

import numpy as np

from megatron_nexus.base.durable import fsync, naming_errors
from megatron_nexus.base.invocation import command
from megatron_nexus.checkpoint.chunks import fragment_boxes
from megatron_nexus.checkpoint.data_file import (
    DTYPE,
    STATES,
    Chunk,
    DataFileRecord,
    block_checksums,
    chunk_starts,
    data_file_name,
    data_file_record,
    safetensors_header,
    write_at,
)
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import Manifest, Topology
from megatron_nexus.checkpoint.new_checkpoint import new_checkpoint
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError
from megatron_nexus.growth.grown_reader import GrownReader
from megatron_nexus.growth.plan import GrowthPlan
from megatron_nexus.growth.report import checkpoint_bytes
from megatron_nexus.growth.settings import STACKING
from megatron_nexus.growth.verify import compare
from megatron_nexus.growth.worker_group import Advance, WorkerGroup, os_error_message
from megatron_nexus.log import logger
from megatron_nexus.models.decoder import layer_specs, stage_layers
from megatron_nexus.spec.shard import Shard


@dataclass(frozen=True)
class Target:
    """One chunk of the new checkpoint: whose file it lies in, its number there, its first byte."""

    rank: int
    number: int
    start: int
    chunk: Chunk

    @property
    def bytes(self) -> int:
        """Its length."""
        return self.chunk.box.numel * DTYPE.itemsize


def target_files(config: RunConfig) -> list[list[Chunk]]:
    """Return the chunks in the file of each rank of the topology in `config`, with one copy of the model."""
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    layers = layer_specs(config.model)
    files = []
    for held in stage_layers(config.model, config.training.seq_length, pp):
        specs = [spec for index in held for spec in layers[index]]
        for rank in range(tp):
            shard = Shard(rank, tp)
            files.append(
                [
                    Chunk(spec.name, state, part.box)
                    for spec in specs
                    if spec.is_sharded or rank == 0
                    for state in STATES
                    for part in fragment_boxes(spec, shard, 0, prod(shard.local_shape(spec)))
                ]
            )
    return files


def targets_of(files: Sequence[Sequence[Chunk]]) -> list[Target]:
    """Return all chunks, those of one part of a tensor together: what they read lies together too."""
    order: dict[tuple[str, str], int] = {}
    targets = []
    for rank, chunks in enumerate(files):
        starts = chunk_starts(safetensors_header(chunks), chunks)
        for number, (chunk, start) in enumerate(zip(chunks, starts, strict=False)):  # one more: the length
            order.setdefault((chunk.tensor, chunk.state), len(order))
            targets.append(Target(rank, number, start, chunk))
    return sorted(targets, key=lambda t: (order[t.chunk.tensor, t.chunk.state], t.chunk.box.offsets))


def write_chunks_at(
    open_reader: Callable[[], GrownReader], folder: Path, work_items: Sequence[Target], advance: Advance
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Write chunks into the data files; return (rank, number, CRC-32 of its blocks) of each.

    While a chunk is written and its checksum computed the next one is read: memory for two chunks.

    Raises CheckpointError, OSError.
    """
    reader = open_reader()
    files: dict[int, int] = {}
    checksums: list[tuple[int, int, tuple[int, ...]]] = []
    in_flight: tuple[Target, Future[None], Future[tuple[int, ...]]] | None = None
    # Two buffers by turns: fresh memory costs more than all else that is done with it.
    most = max((target.chunk.box.numel for target in work_items), default=0)
    buffers = [np.empty(most, DTYPE) for _ in range(2)]

    def land(target: Target, written: Future[None], checksum: Future[tuple[int, ...]]) -> None:
        with naming_errors(folder / data_file_name([target.rank])):
            written.result()
        checksums.append((target.rank, target.number, checksum.result()))
        advance(target.bytes)

    try:
        with ThreadPoolExecutor(2) as background:
            for target, buffer in zip(work_items, cycle(buffers)):
                if target.rank not in files:
                    files[target.rank] = os.open(folder / data_file_name([target.rank]), os.O_WRONLY)
                chunk = target.chunk
                values = buffer[: chunk.box.numel]
                reader.read_into(values.reshape(chunk.box.sizes), chunk.tensor, chunk.state, chunk.box)
                contents = values.view(np.uint8).data
                if in_flight:
                    land(*in_flight)
                written = background.submit(_write, files[target.rank], contents, target.start)
                in_flight = target, written, background.submit(block_checksums, contents)
            if in_flight:
                land(*in_flight)
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return checksums


def _write(descriptor: int, contents: memoryview, start: int) -> None:
    write_at(descriptor, contents, start)
    # Begins to write back at once, so that the disk works from the first chunk on and not from a full cache.
    os.posix_fadvise(descriptor, start, len(contents), os.POSIX_FADV_DONTNEED)


def grow_checkpoint(
    plan: GrowthPlan, source: Location, root: Path, group: WorkerGroup, verify: bool = False
) -> Path:
    """Write the checkpoint `source`, grown as planned, as the latest in `root`; a collective call.

    The topology of `plan.after` shapes the files. `verify` compares the logits of both checkpoints before the
    new one gets its name, and enters the result in its lineage. Returns the new checkpoint's folder.

    Raises CheckpointError: on every rank, if one cannot read or write, another process saves in `root`, or
    the logits differ; nothing is left behind.
    """
    config = plan.after
    open_reader = partial(GrownReader, source, plan)
    manifest = open_reader().manifest
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    manifest = replace(manifest, topology=Topology(tp * pp, pp, 1, tp))
    needed = checkpoint_bytes(config.model)
    step = manifest.progress.step
    with (
        group.aborted_on_error(),
        new_checkpoint(root, step, group.comm, needed, new_run=True, describe=os_error_message) as checkpoint,
    ):
        files = target_files(config)
        targets = targets_of(files)
        checkpoint.on_first_rank(partial(_lay_out, checkpoint.folder, files))
        stage = f"writing {len(targets):,} chunks"
        work = partial(write_chunks_at, open_reader, checkpoint.folder)
        parts = group.map_partitions(targets, attrgetter("bytes"), work, stage)
        checksums = {(rank, number): found for part in parts for rank, number, found in part}
        records = [
            data_file_record(
                [rank], safetensors_header(chunks), chunks, [checksums[rank, n] for n in range(len(chunks))]
            )
            for rank, chunks in enumerate(files)
        ]
        checkpoint.on_first_rank(partial(_make_durable, checkpoint.folder, records))
        checkpoint.finish(
            manifest, records, partial(_verified, plan, source, checkpoint.folder) if verify else None
        )
    return checkpoint.path


def _lay_out(folder: Path, files: Sequence[Sequence[Chunk]]) -> None:
    """Create the data files in their full length. Raises OSError."""
    for rank, chunks in enumerate(files):
        path = folder / data_file_name([rank])
        header = safetensors_header(chunks)
        with naming_errors(path), path.open("wb") as file:
            file.write(header)
            file.truncate(chunk_starts(header, chunks)[-1])


def _make_durable(folder: Path, records: Sequence[DataFileRecord]) -> None:
    for record in records:
        fsync(folder / record.name)


def _verified(plan: GrowthPlan, source: Location, folder: Path, manifest: Manifest) -> Manifest:
    """Return the manifest with the result of the comparison in the newest entry of its lineage.

    Raises CheckpointError if the function has changed, unless the recipe changes it by intent.
    """
    found = compare(plan, source, folder)
    if not isfinite(found.largest_logit):
        raise CheckpointError(
            f"{source}: its own logits are not finite ({found.largest_logit}), so nothing can be verified: "
            f"{command('inspect')} --verify names the tensors that hold NaN or infinity; take an "
            "earlier checkpoint"
        )
    message = f"logits moved by at most {found.largest_error:.1e}, the largest is {found.largest_logit:.3g}"
    if not found.holds and not plan.changes:
        raise CheckpointError(
            f"{source}: {message}, more than rounding: the grown checkpoint was discarded; please report this"
        )
    if found.holds:
        logger.info("verified in float64: %s", message)
    else:
        flags = " and ".join(plan.changes)
        remedy = "; --depth-init copy keeps it" if plan.changes == [STACKING] else ""
        logger.info("the function changed, as %s does: in float64 %s%s", flags, message, remedy)
    if plan.after.model.vocab_size > plan.before.model.vocab_size:
        logger.info("new tokens raise the loss by %.4f nats/token until they are learnt", found.loss_shift)
    if not plan.axes:
        return manifest
    *earlier, newest = manifest.lineage
    return replace(manifest, lineage=[*earlier, {**newest, "verification": dict(vars(found))}])

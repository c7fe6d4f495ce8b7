"""Write the grown checkpoint: target files chunk by chunk, shared out over workers, in bounded memory.

The files are laid out as the ranks of the target topology would write them. Their headers and lengths
are known beforehand, so any worker can put any chunk in its place. The folder gets its name last:
an interrupted growth leaves nothing; after a kill, which nothing can tidy, the next growth or run that saves
there removes the temporary folder.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
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
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    Topology,
    manifest_to_json,
    read_manifest,
)
from megatron_nexus.checkpoint.run_dir import (
    abandon_checkpoint,
    begin_checkpoint,
    checkpoint_name,
    newest_checkpoint,
    publish_checkpoint,
    temporary_folder,
)
from megatron_nexus.checkpoint.run_lock import run_dir_lock
from megatron_nexus.checkpoint.store import (
    DTYPE,
    STATES,
    Chunk,
    block_checksums,
    chunk_starts,
    rank_files,
    safetensors_header,
    write_at,
    write_durably,
    write_index,
)
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import CheckpointError
from megatron_nexus.growth.grown_reader import GrownReader
from megatron_nexus.growth.plan import GrowthPlan
from megatron_nexus.growth.report import checkpoint_bytes
from megatron_nexus.growth.request import CHANGING
from megatron_nexus.growth.verify import compare
from megatron_nexus.growth.worker_group import Advance, WorkerGroup
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
    """The chunks in the file of each rank of the topology in `config`, with one copy of the model."""
    tp = config.parallel.tensor_model_parallel_size
    pp = config.parallel.pipeline_model_parallel_size
    layers = layer_specs(config.model)
    files = []
    for stage in range(pp):
        held = stage_layers(config.model, config.training.seq_length, stage, pp)
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
    """All chunks, those of the same part of a tensor together: what they read lies together too."""
    order: dict[tuple[str, str], int] = {}
    targets = []
    for rank, chunks in enumerate(files):
        for number, (chunk, start) in enumerate(zip(chunks, chunk_starts(chunks)[:-1], strict=True)):
            order.setdefault((chunk.tensor, chunk.state), len(order))
            targets.append(Target(rank, number, start, chunk))
    return sorted(targets, key=lambda t: (order[t.chunk.tensor, t.chunk.state], t.chunk.box.offsets))


def write_chunks_at(
    open_reader: Callable[[], GrownReader], folder: Path, work_items: Sequence[Target], advance: Advance
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Put a worker's chunks in their places; (rank, number, CRC-32 of its blocks) of each.

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
        with naming_errors(rank_files(folder, target.rank)[0]):
            written.result()
        checksums.append((target.rank, target.number, checksum.result()))
        advance(target.bytes)

    try:
        with ThreadPoolExecutor(2) as beside:
            for target, buffer in zip(work_items, cycle(buffers)):
                if target.rank not in files:
                    files[target.rank] = os.open(rank_files(folder, target.rank)[0], os.O_WRONLY)
                chunk = target.chunk
                values = buffer[: chunk.box.numel]
                reader.read_into(values.reshape(chunk.box.sizes), chunk.tensor, chunk.state, chunk.box)
                contents = values.view(np.uint8).data
                if in_flight:
                    land(*in_flight)
                written = beside.submit(_write, files[target.rank], contents, target.start)
                in_flight = target, written, beside.submit(block_checksums, contents)
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

    Raises:
        CheckpointError: on every rank, if one cannot read or write, another process saves in `root`, or the
            logits differ; nothing is left behind.
    """
    with ExitStack() as held:
        with group.raise_on_all_ranks(f"{root}: cannot write the checkpoint"):
            if group.is_first:
                held.enter_context(run_dir_lock(root))
                _require_empty(root)
        _grow(plan, source, root, group, verify)
    return root / checkpoint_name(read_manifest(source).progress.step)


def _require_empty(root: Path) -> None:
    """Raise CheckpointError where checkpoints lie in `root`."""
    newest = newest_checkpoint(root)
    if newest is not None:
        raise CheckpointError(
            f"--save {root} holds {newest.name}, and checkpoints are never overwritten: give another folder"
        )


def _grow(plan: GrowthPlan, source: Location, root: Path, group: WorkerGroup, verify: bool) -> None:
    """As `grow_checkpoint`, in a folder that is ours."""
    config = plan.after
    open_reader = partial(GrownReader, source, plan)
    manifest = open_reader().manifest
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    manifest = replace(manifest, topology=Topology(tp * pp, pp, 1, tp))
    step = manifest.progress.step
    folder = temporary_folder(root, step)
    try:
        with group.raise_on_all_ranks(f"{root}: cannot write the checkpoint"):
            if group.is_first:
                _begin(root, step, config)
        files = target_files(config)
        targets = targets_of(files)
        with group.raise_on_all_ranks(f"{root}: cannot write the checkpoint"):
            if group.is_first:
                _lay_out(folder, files)
        stage = f"writing {len(targets):,} chunks"
        work = partial(write_chunks_at, open_reader, folder)
        parts = group.map_partitions(targets, attrgetter("bytes"), work, stage)
        with group.raise_on_all_ranks(f"{root}: cannot write the checkpoint"):
            if group.is_first:
                _finish(root, step, files, [entry for part in parts for entry in part], manifest)
                if verify:
                    verified = _verified(plan, source, folder, manifest)
                    write_durably(folder / MANIFEST_FILE, manifest_to_json(verified))
                publish_checkpoint(root, step)
    except BaseException as error:
        if group.is_first:
            abandon_checkpoint(root, step)
        if group.comm.size > 1 and not isinstance(error, CheckpointError):  # of those every rank knows
            group.comm.abort()
        raise


def _begin(root: Path, step: int, config: RunConfig) -> None:
    """Make the temporary folder, before chunks without end are listed. Raises OSError, CheckpointError."""
    begin_checkpoint(root, step)
    needed, free = checkpoint_bytes(config.model), shutil.disk_usage(root).free
    if needed > free:
        raise CheckpointError(
            f"the new checkpoint needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB: "
            "make room, or save elsewhere"
        )


def _lay_out(folder: Path, files: Sequence[Sequence[Chunk]]) -> None:
    """Make the data files, full length. Raises OSError."""
    for rank, chunks in enumerate(files):
        path = rank_files(folder, rank)[0]
        with naming_errors(path), path.open("wb") as file:
            file.write(safetensors_header(chunks))
            file.truncate(chunk_starts(chunks)[-1])


def _finish(
    root: Path,
    step: int,
    files: Sequence[Sequence[Chunk]],
    checksums: Sequence[tuple[int, int, tuple[int, ...]]],
    manifest: Manifest,
) -> None:
    """Write indices and manifest, and make all durable. Raises OSError."""
    folder = temporary_folder(root, step)
    found = {(rank, number): checksum for rank, number, checksum in checksums}
    for rank, chunks in enumerate(files):
        fsync(rank_files(folder, rank)[0])
        write_index(folder, rank, chunks, [found[rank, number] for number in range(len(chunks))], {})
    write_durably(folder / MANIFEST_FILE, manifest_to_json(manifest))


def _verified(plan: GrowthPlan, source: Location, folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the result of the comparison in the newest entry of its lineage.

    Raises CheckpointError where the function has changed; `noise` and `random` change it by intent.
    """
    found = compare(plan, source, folder)
    if not isfinite(found.largest_logit):
        raise CheckpointError(
            f"{source}: its own logits are not finite ({found.largest_logit}), so nothing can be verified: "
            f"{command('inspect')} --verify names the tensors that hold NaN or infinity; take an "
            "earlier checkpoint"
        )
    message = f"logits moved by at most {found.largest_error:.1e}, the largest is {found.largest_logit:.3g}"
    init = plan.settings.init
    if not found.holds and init not in CHANGING:
        raise CheckpointError(
            f"{source}: {message}, more than rounding: the grown checkpoint was discarded; please report this"
        )
    if found.holds:
        logger.info("verified in float64: %s", message)
    else:
        logger.info("the function changed, as --init %s does: in float64 %s", init, message)
    if plan.after.model.vocab_size > plan.before.model.vocab_size:
        logger.info("new tokens raise the loss by %.4f nats/token until they are learnt", found.loss_shift)
    if not plan.axes:
        return manifest
    *earlier, newest = manifest.lineage
    return replace(manifest, lineage=[*earlier, {**newest, "verification": dict(vars(found))}])

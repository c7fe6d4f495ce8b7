"""Save a training state, at once or in the background, without gathering tensors.

Every rank streams the chunks it owns into a temporary folder; when all have succeeded rank 0 writes the
index and the manifest, renames the folder and replaces `latest`. Ranks of a node write one data file, each
its own bytes: a save has as many files as nodes, and two. Files are written by one thread of each rank; the
ranks agree in their main threads only, so that no collective overlaps those of the training.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_nexus.checkpoint.data_file import (
    Array,
    Chunk,
    DataFileRecord,
    FilePart,
    parts_of_one_file,
    write_chunks,
)
from megatron_nexus.checkpoint.host_copies import held, passing
from megatron_nexus.checkpoint.index import part_from_json, part_to_json, record_from_json, record_to_json
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import (
    UNKNOWN_DATA,
    DataRecord,
    GrownRegion,
    JsonObject,
    Manifest,
    OptimizerRecord,
    RunProgress,
    spec_from_json,
    spec_to_json,
)
from megatron_nexus.checkpoint.new_checkpoint import NewCheckpoint
from megatron_nexus.checkpoint.run_dir import delete_outdated
from megatron_nexus.checkpoint.storage import folder_of
from megatron_nexus.checkpoint.train_state import TrainState, random_states, topology_of
from megatron_nexus.errors import CheckpointError
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.param import ParamSpec

REMEDY = "make room, or save to another folder that all ranks share; earlier checkpoints are untouched"


@dataclass(frozen=True)
class SaveRequest:
    """What the manifest records of the run at a save, in addition to the state of the engine."""

    progress: RunProgress
    config: JsonObject
    tokenizer_fingerprint: str
    lineage: Sequence[JsonObject] = ()
    data: DataRecord = UNKNOWN_DATA
    grown_regions: Sequence[GrownRegion] = ()
    prepend_bos: bool | None = None


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint; for how long training stood still for it, and how long all of it took."""

    step: int
    folder: Location
    stall_s: float
    total_s: float


@dataclass
class _Save:
    """A save under way, and this rank's job: to write its data file, then to publish the checkpoint."""

    checkpoint: NewCheckpoint[Location]
    manifest: Manifest
    began: float
    job: Future[DataFileRecord] | Future[None]
    stall_s: float = 0.0


class CheckpointWriter:
    """Writes the checkpoints of a run into `root`, one at a time; all methods are collective calls."""

    def __init__(
        self,
        root: Location,
        state: TrainState,
        mesh: Mesh,
        keep_latest: int = 0,
        keep_every: int = 0,
        on_chunk: Callable[[], None] = lambda: None,
        files_per_node: int = 1,
    ) -> None:
        """`on_chunk` is called for each chunk that this rank writes, by the thread that does.

        The ranks of a node write `files_per_node` data files; in an object store each rank has its own.
        """
        self._root = root
        self._state = state
        self._mesh = mesh
        self._keep_latest, self._keep_every = keep_latest, keep_every
        self._on_chunk = on_chunk
        self._files_per_node = files_per_node
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way, of which all ranks know."""
        return self._save is not None

    def begin(self, request: SaveRequest, async_save: bool) -> None:
        """Begin to write `root`/iter_<step> between two optimizer steps; no save is under way.

        With `async_save` training may go on once this returns: it takes host memory for what this rank owns.
        Without it nothing may change before `finish`. A checkpoint of the same step is replaced.

        Raises CheckpointError: on every rank, if one cannot write; the previous checkpoint stays the latest.
        """
        state, mesh, step = self._state, self._mesh, request.progress.step
        assert self._save is None, "one save at a time"
        began = time.perf_counter()
        checkpoint = NewCheckpoint(self._root, step, mesh.control, REMEDY)
        with self._abandoned_on_error(checkpoint):
            checkpoint.begin()
        specs, groups = _of_all_stages(state, mesh)
        manifest = Manifest(
            progress=request.progress,
            specs=specs,
            optimizer=OptimizerRecord(state.step_count, groups, request.grown_regions),
            engine=state.counters,
            topology=topology_of(mesh),
            config=request.config,
            tokenizer_fingerprint=request.tokenizer_fingerprint,
            lineage=request.lineage,
            data=request.data,
            prepend_bos=request.prepend_bos,
        )
        owned = list(_owned(state, mesh))
        values = (held if async_save else passing)([tensor for _, tensor in owned], mesh.device)
        parts = self._parts_of_file(FilePart(mesh.rank, [chunk for chunk, _ in owned], random_states(mesh)))
        own = [part.rank for part in parts].index(mesh.rank)
        job = self._thread.submit(write_chunks, checkpoint.folder, parts, self._arrays(values), own)
        self._save = _Save(checkpoint, manifest, began, job, time.perf_counter() - began)

    def _parts_of_file(self, mine: FilePart) -> list[FilePart]:
        """Return the parts of this rank's data file, in the order of ranks; a collective call."""
        if not folder_of(self._root).has_shared_files:
            return [mine]
        # Ranks that the launcher has numbered otherwise may be on other machines: those have other files.
        host = socket.gethostname()
        told = self._mesh.control.all_gather_str_on_node(json.dumps([host, part_to_json(mine)]))
        near = [part_from_json(part) for at, part in map(json.loads, told) if at == host]
        return parts_of_one_file(near, mine.rank, self._files_per_node)

    def _arrays(self, values: Iterator[Tensor]) -> Iterator[Array]:
        for tensor in values:
            self._on_chunk()
            yield tensor.numpy()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a save is still being written: `settle` would wait for it."""
        return self._save is not None and not self._save.job.done()

    def finish(self) -> Saved | None:
        """Wait for the save that is under way, if one is. Raises CheckpointError as `begin` does."""
        began, saved = time.perf_counter(), None
        while self._save is not None:
            saved = self.settle()
        return saved and replace(saved, stall_s=saved.stall_s + time.perf_counter() - began)

    def settle(self) -> Saved | None:
        """Wait for the job of every rank and start the next; return what was saved after the last.

        A save is under way. Raises CheckpointError as `begin` does.
        """
        save = self._save
        assert save is not None, "nothing is under way"
        checkpoint = save.checkpoint
        with self._abandoned_on_error(checkpoint):
            with checkpoint.agreed():
                record = _result(save.job)
            if record is not None:  # this rank's data file, as those of the others, is written
                records = self._mesh.control.gather_str(json.dumps(record_to_json(record)))
                files = [record_from_json(json.loads(text)) for text in records]
                save.job = self._thread.submit(self._publish, checkpoint, save.manifest, files)
                return None
        self._save = None
        step = save.manifest.progress.step
        return Saved(step, checkpoint.path, save.stall_s, time.perf_counter() - save.began)

    def _publish(
        self, checkpoint: NewCheckpoint[Location], manifest: Manifest, files: Sequence[DataFileRecord]
    ) -> None:
        """Make the checkpoint complete, on rank 0, once all ranks have written. Raises OSError."""
        if self._mesh.rank == 0:
            checkpoint.publish(manifest, files)
            delete_outdated(self._root, self._keep_latest, self._keep_every)

    @contextmanager
    def _abandoned_on_error(self, checkpoint: NewCheckpoint[Location]) -> Iterator[None]:
        """Delete what was written if the ranks raise CheckpointError, before any of them goes on."""
        try:
            yield
        except CheckpointError:
            self._save = None
            checkpoint.abandon()
            self._mesh.control.barrier()  # no rank goes on while the folder is still there
            raise


def _result(job: Future[DataFileRecord] | Future[None]) -> DataFileRecord | None:
    """Wait for a job and return its result, or raise its error as one that is reported to all ranks."""
    error = job.exception()
    if error is None or isinstance(error, OSError | CheckpointError):
        return job.result()
    raise CheckpointError(f"the writer failed: {type(error).__name__}: {error}") from error


def _owned(state: TrainState, mesh: Mesh) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield what this rank writes; of tensor-parallel ranks that all hold the same, the first writes."""
    for view in state.views():
        if view.spec.is_sharded or mesh.tp_rank == 0:
            yield from view.chunks()


def _of_all_stages(state: TrainState, mesh: Mesh) -> tuple[dict[str, ParamSpec], dict[str, JsonObject]]:
    """Return the specs and the optimizer groups of all pipeline stages; a collective call."""
    mine = {"specs": list(map(spec_to_json, state.specs.values())), "groups": state.groups}
    specs: dict[str, ParamSpec] = {}
    groups: dict[str, JsonObject] = {}
    for stage in map(json.loads, mesh.gather_from_stages(json.dumps(mine))):
        for spec in map(spec_from_json, stage["specs"]):
            assert spec.name not in specs, f"two pipeline stages hold {spec.name}"
            specs[spec.name] = spec
        groups.update(stage["groups"])
    return specs, groups

"""Load a training state at any topology, without gathering anything.

Every rank reads the boxes that it holds, whichever rank wrote them; at the topology that wrote them the state
is the same bit for bit.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_nexus.base.communicator import raise_on_all_ranks
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, Manifest
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.checkpoint.train_state import TrainState, restore_random_states, topology_of
from megatron_nexus.errors import CheckpointError, DamagedCheckpointError
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.param import ParamSpec


def load_checkpoint(
    folder: Location,
    state: TrainState,
    mesh: Mesh,
    open_state: Callable[[Location], StateReader] = CheckpointReader,
    on_chunk: Callable[[], None] = lambda: None,
) -> Manifest:
    """Put the checkpoint `folder` into `state`; a collective call.

    Restores master weights, moments, the model's weights, the optimizer's step count and its groups'
    hyper-parameters (those saved win over the run's), the engine's counters and, where the topology is
    the one that wrote the checkpoint, each rank's random generators. Data position, schedule and, at
    another topology, random generators are the caller's to derive from the returned manifest. `open_state`
    may read the checkpoint as another one, grown. `on_chunk` is called for each chunk that this rank reads.

    Raises CheckpointError: on every rank, if one finds the checkpoint missing, damaged, incomplete or of
    another model. If only the tensors' contents are at fault, the state is left half loaded, and the error
    is a DamagedCheckpointError.
    """
    purpose = f"{folder}: cannot load the checkpoint"
    with _as_damage(), raise_on_all_ranks(mesh.control, purpose):
        reader = open_state(folder)
        identity = zlib.crc32((folder / MANIFEST_FILE).read_bytes())
    with raise_on_all_ranks(mesh.control, purpose):
        _check_specs(reader, state)
    _check_agreement(reader, identity, state, mesh)
    with _as_damage(), raise_on_all_ranks(mesh.control, purpose):
        state.restore_groups(reader.manifest.optimizer.groups)
        state.clear()
        for view in state.views():
            for chunk, values in view.chunks():
                on_chunk()
                values.copy_(torch.from_numpy(reader.read_box(chunk.tensor, chunk.state, chunk.box)))
        as_written = reader.manifest.topology == topology_of(mesh)
        random_states = reader.random_states(mesh.rank) if as_written else {}
    state.step_count = reader.manifest.optimizer.step_count
    state.refresh_model()
    state.counters = reader.manifest.engine
    restore_random_states(random_states, mesh)
    return reader.manifest


@contextmanager
def _as_damage() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise DamagedCheckpointError(str(error)) from error


def _check_specs(reader: StateReader, state: TrainState) -> None:
    """Check that the checkpoint holds this stage's parameters in their shapes."""
    problems = []
    for spec in state.specs.values():
        saved = reader.manifest.specs.get(spec.name)
        if saved is None:
            problems.append(f"{spec.name}: not in the checkpoint, {_axes(spec)} in the model")
        elif _axes(saved) != _axes(spec):
            problems.append(f"{spec.name}: {_axes(saved)} in the checkpoint, {_axes(spec)} in the model")
    _raise_mismatch(reader, problems)


def _check_agreement(reader: StateReader, identity: int, state: TrainState, mesh: Mesh) -> None:
    """Check that all ranks read the same checkpoint, and the model has its tensors; a collective call."""
    if len(mesh.control.distinct_str(str(identity))) > 1:
        raise CheckpointError(f"{reader.folder}: the ranks see different checkpoints: use a shared folder")
    stages = mesh.gather_from_stages(json.dumps(list(state.specs)))
    held = {name for stage in stages for name in json.loads(stage)}
    extra = [spec for name, spec in reader.manifest.specs.items() if name not in held]
    _raise_mismatch(reader, [f"{s.name}: {_axes(s)} in the checkpoint, not in the model" for s in extra])


def _raise_mismatch(reader: StateReader, problems: list[str]) -> None:
    if problems:
        shown = problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise CheckpointError(
            f"{reader.folder / MANIFEST_FILE}: of another model: {'; '.join(shown)}: "
            "set the model's sizes as the checkpoint's, or load another one"
        )


def _axes(spec: ParamSpec) -> str:
    return " x ".join(f"{axis.name} {axis.size}" for axis in spec.axes)

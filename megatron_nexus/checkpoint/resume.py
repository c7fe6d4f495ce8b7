"""Load the training state of a DeepSpeed engine, at any topology, without gathering anything.

Every rank reads the boxes of its own fragments, whoever wrote them; at the topology that wrote them the state
is the same bit for bit.
"""

import json
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_nexus.base.communicator import raise_on_all_ranks
from megatron_nexus.checkpoint.chunks import fragment_boxes
from megatron_nexus.checkpoint.data_file import STATES, Chunk
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    Topology,
)
from megatron_nexus.checkpoint.store import CheckpointReader, StateReader
from megatron_nexus.checkpoint.zero_state import DeepSpeedEngine, Parameters, ZeroState, zero_state
from megatron_nexus.errors import CheckpointError
from megatron_nexus.parallel.host_collectives import MeshRanks, all_gather_str, gather_from_stages
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Shard


def topology_of(mesh: Mesh) -> Topology:
    """How the ranks of this run are arranged."""
    return Topology(mesh.world_size, mesh.pp_size, mesh.dp_size, mesh.tp_size)


def load_checkpoint(
    folder: Location,
    engine: DeepSpeedEngine,
    parameters: Parameters,
    mesh: Mesh,
    shard: Shard,
    open_state: Callable[[Location], StateReader] = CheckpointReader,
) -> Manifest:
    """Put the state of the checkpoint `folder` into the engine; a collective call.

    Restores master weights, moments, the model's weights, the optimizer's step count and its groups'
    hyper-parameters (those saved win over the run's), the engine's counters and, where the topology is
    the one that wrote the checkpoint, each rank's random generators. Data position, schedule and, at
    another topology, random generators are the caller's to derive from the returned manifest. `open_state`
    may read the checkpoint as another one, grown.

    Raises:
        CheckpointError: on every rank, if one finds the checkpoint missing, damaged, incomplete or of
            another model. If only the tensors' contents are at fault, the engine is left half loaded.
    """
    purpose = f"{folder}: cannot load the checkpoint"
    zero = zero_state(engine.optimizer)
    with raise_on_all_ranks(MeshRanks(mesh), purpose):
        reader = open_state(folder)
        _check_specs(reader, parameters)
        identity = zlib.crc32((folder / MANIFEST_FILE).read_bytes())
    _check_agreement(reader, identity, parameters, mesh)
    with raise_on_all_ranks(MeshRanks(mesh), purpose):
        zero.restore_groups(reader.manifest.optimizer.groups)
        zero.clear()
        for chunk, values in state_views(zero, parameters, shard):
            values.copy_(torch.from_numpy(reader.read_box(chunk.tensor, chunk.state, chunk.box)))
        as_written = reader.manifest.topology == topology_of(mesh)
        random_states = reader.random_states(mesh.rank) if as_written else {}
    zero.step_count = reader.manifest.optimizer.step_count
    zero.refresh_model()
    saved = reader.manifest.engine
    engine.global_steps = saved.global_steps
    engine.global_samples = saved.global_samples
    engine.skipped_steps = saved.skipped_steps
    # Counted anew: the number of micro-batches in a step may have changed with the topology.
    engine.micro_steps = saved.global_steps * engine.gradient_accumulation_steps()
    _restore_random_states(random_states, mesh)
    return reader.manifest


def state_views(zero: ZeroState, parameters: Parameters, shard: Shard) -> Iterator[tuple[Chunk, Tensor]]:
    """Each box of this rank's state with a view of the optimizer's memory that holds it."""
    for fragment in zero.fragments(parameters):
        spec = fragment.spec
        held, expected = fragment.local_shape, shard.local_shape(spec)
        assert held == expected, f"{spec.name} has the local shape {held}, its spec and shard say {expected}"
        for part in fragment_boxes(spec, shard, fragment.start, fragment.count):
            for state in STATES:
                run = fragment.states[state][part.start : part.start + part.run_length]
                yield Chunk(spec.name, state, part.box), run.view(part.stored)[part.corner]


def _check_specs(reader: StateReader, parameters: Parameters) -> None:
    """Whether the checkpoint holds this stage's parameters in their shapes."""
    problems = []
    for spec, _ in parameters.values():
        saved = reader.manifest.specs.get(spec.name)
        if saved is None:
            problems.append(f"{spec.name}: not in the checkpoint, {_axes(spec)} in the model")
        elif _axes(saved) != _axes(spec):
            problems.append(f"{spec.name}: {_axes(saved)} in the checkpoint, {_axes(spec)} in the model")
    _raise_mismatch(reader, problems)


def _check_agreement(reader: StateReader, identity: int, parameters: Parameters, mesh: Mesh) -> None:
    """Whether all ranks read the same checkpoint and the model has all of its tensors; a collective call.

    Every rank comes to the same answer.
    """
    if len(set(all_gather_str(mesh, str(identity)))) > 1:
        raise CheckpointError(f"{reader.folder}: the ranks see different checkpoints: use a shared folder")
    stages = gather_from_stages(mesh, json.dumps(list(parameters)))
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


def random_states(mesh: Mesh) -> dict[str, bytes]:
    """The states of this rank's random generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return {name: state.numpy().tobytes() for name, state in states.items()}


def _restore_random_states(states: dict[str, bytes], mesh: Mesh) -> None:
    tensors = {name: torch.frombuffer(bytearray(s), dtype=torch.uint8) for name, s in states.items()}
    if "cpu" in tensors:
        torch.set_rng_state(tensors["cpu"])
    if mesh.device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], mesh.device)

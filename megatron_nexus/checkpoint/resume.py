"""Save and load the training state of a DeepSpeed engine, at any topology, without gathering anything.

Saving: every rank streams the pieces it owns into a temporary folder; when all have succeeded rank 0
writes the manifest, renames the folder and replaces `latest`. Loading: every rank reads the boxes of its
own fragments, whoever wrote them; at the topology that wrote them the state is the same bit for bit.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_nexus.checkpoint.agreement import exchange, tell, together
from megatron_nexus.checkpoint.manifest import (
    MANIFEST_FILE,
    UNKNOWN_DATA,
    Birth,
    DataRecord,
    EngineRecord,
    JsonObject,
    Manifest,
    OptimizerRecord,
    RunProgress,
    Topology,
    manifest_to_json,
    spec_from_json,
    spec_to_json,
)
from megatron_nexus.checkpoint.pieces import slabs
from megatron_nexus.checkpoint.retention import KEEP_ALL, Retention, delete_outdated
from megatron_nexus.checkpoint.run_folder import (
    abandon_checkpoint,
    begin_checkpoint,
    checkpoint_name,
    publish_checkpoint,
    temporary_folder,
)
from megatron_nexus.checkpoint.store import (
    STATES,
    CheckpointReader,
    Piece,
    StateReader,
    write_durably,
    write_pieces,
)
from megatron_nexus.checkpoint.zero_pieces import Engine, Parameters, ZeroState, zero_state
from megatron_nexus.errors import CheckpointError
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Shard


def topology_of(mesh: Mesh) -> Topology:
    """How the ranks of this run are arranged."""
    return Topology(mesh.world_size, mesh.pipe_size, mesh.data_size, mesh.tensor_size)


def save_checkpoint(
    root: Path,
    engine: Engine,
    parameters: Parameters,
    mesh: Mesh,
    shard: Shard,
    progress: RunProgress,
    config: JsonObject,
    tokenizer_fingerprint: str,
    lineage: Sequence[JsonObject] = (),
    data: DataRecord = UNKNOWN_DATA,
    births: Sequence[Birth] = (),
    retention: Retention = KEEP_ALL,
) -> Path:
    """Write `root`/iter_<step> and make it the latest; a collective call between two optimizer steps.

    `parameters` are those of this rank's pipeline stage, each stage's different. A checkpoint of the same
    step in `root` is replaced. Returns the checkpoint's folder.

    Raises:
        CheckpointError: on every rank, if one cannot write; the previous checkpoint stays the latest.
    """
    assert engine.micro_steps % engine.gradient_accumulation_steps() == 0, "gradients would be lost"
    zero = zero_state(engine.optimizer)
    temporary, place = temporary_folder(root, progress.step), root / checkpoint_name(progress.step)
    purpose = f"{place}: cannot save the checkpoint"
    remedy = "make room, or save to another folder that all ranks share; earlier checkpoints are untouched"
    try:
        with together(mesh, purpose, remedy):
            if mesh.rank == 0:
                begin_checkpoint(root, progress.step)
        with together(mesh, purpose, remedy):
            owned = list(_owned(zero, parameters, mesh, shard))
            pieces = [piece for piece, _ in owned]
            arrays = (values.cpu().numpy() for _, values in owned)
            write_pieces(temporary, mesh.rank, pieces, arrays, _random_states(mesh))
        specs, groups = _of_all_stages(zero, parameters, mesh)
        with together(mesh, purpose, remedy):
            if mesh.rank == 0:
                manifest = Manifest(
                    progress=progress,
                    specs=specs,
                    optimizer=OptimizerRecord(zero.step_count, groups, births),
                    engine=EngineRecord(engine.global_steps, engine.global_samples, engine.skipped_steps),
                    topology=topology_of(mesh),
                    config=config,
                    tokenizer_fingerprint=tokenizer_fingerprint,
                    lineage=lineage,
                    data=data,
                )
                write_durably(temporary / MANIFEST_FILE, manifest_to_json(manifest))
                publish_checkpoint(root, progress.step)
                delete_outdated(root, retention)
    except CheckpointError:
        if mesh.rank == 0:
            abandon_checkpoint(root, progress.step)
        exchange(mesh, "")  # a barrier: no rank goes on while the folder is still there
        raise
    return place


def load_checkpoint(
    folder: Path,
    engine: Engine,
    parameters: Parameters,
    mesh: Mesh,
    shard: Shard,
    open_state: Callable[[Path], StateReader] = CheckpointReader,
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
    with together(mesh, purpose):
        reader = open_state(folder)
        _check_specs(reader, parameters)
        identity = zlib.crc32((folder / MANIFEST_FILE).read_bytes())
    _check_agreement(reader, identity, parameters, mesh)
    with together(mesh, purpose):
        zero.restore_groups(reader.manifest.optimizer.groups)
        zero.clear()
        for piece, values in _slab_views(zero, parameters, shard):
            values.copy_(torch.from_numpy(reader.read_box(piece.tensor, piece.state, piece.box)))
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


def _slab_views(zero: ZeroState, parameters: Parameters, shard: Shard) -> Iterator[tuple[Piece, Tensor]]:
    """Each box of this rank's state with a view of the optimizer's memory that holds it."""
    for fragment in zero.fragments(parameters):
        spec = fragment.spec
        held, expected = fragment.local_shape, shard.local_shape(spec)
        assert held == expected, f"{spec.name} has the local shape {held}, its spec and shard say {expected}"
        for slab in slabs(spec, shard, fragment.start, fragment.count):
            for state in STATES:
                run = fragment.states[state][slab.start : slab.start + slab.run_length]
                yield Piece(spec.name, state, slab.box), run.view(slab.stored)[slab.corner]


def _owned(
    zero: ZeroState, parameters: Parameters, mesh: Mesh, shard: Shard
) -> Iterator[tuple[Piece, Tensor]]:
    """The boxes that this rank writes; of tensor-parallel ranks that all hold the same, the first writes."""
    for piece, values in _slab_views(zero, parameters, shard):
        if parameters[piece.tensor][0].is_sharded or mesh.tensor == 0:
            yield piece, values


def _from_each_stage(mesh: Mesh, message: str) -> list[str]:
    """The messages of the first rank of each pipeline stage; a collective call."""
    per_stage = mesh.data_size * mesh.tensor_size
    return [tell(mesh, message, pipe * per_stage) for pipe in range(mesh.pipe_size)]


def _of_all_stages(
    zero: ZeroState, parameters: Parameters, mesh: Mesh
) -> tuple[dict[str, ParamSpec], dict[str, JsonObject]]:
    """The specs and the optimizer groups of all pipeline stages; a collective call."""
    mine = {"specs": [spec_to_json(spec) for spec, _ in parameters.values()], "groups": zero.groups}
    specs: dict[str, ParamSpec] = {}
    groups: dict[str, JsonObject] = {}
    for stage in map(json.loads, _from_each_stage(mesh, json.dumps(mine))):
        for spec in map(spec_from_json, stage["specs"]):
            assert spec.name not in specs, f"two pipeline stages hold {spec.name}"
            specs[spec.name] = spec
        groups.update(stage["groups"])
    return specs, groups


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
    if len(set(exchange(mesh, str(identity)))) > 1:
        raise CheckpointError(f"{reader.folder}: the ranks see different checkpoints: use a shared folder")
    stages = _from_each_stage(mesh, json.dumps(list(parameters)))
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


def _random_states(mesh: Mesh) -> dict[str, bytes]:
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

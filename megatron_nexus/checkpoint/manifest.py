"""The manifest of a checkpoint: model, progress, topology, optimizer, data and configuration of its run.

A JSON file with a checksum, written last: a folder that has one is complete. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from megatron_nexus.base.json_text import parse_json, record_of, with_types
from megatron_nexus.checkpoint.checksummed_json import dumps_with_crc, loads_with_crc
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.errors import CheckpointError, os_errors_as
from megatron_nexus.spec.param import Axis, Constant, Flow, Layout, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Box

FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, FORMAT_VERSION)
"""Version 2 had no `files`, and an index per rank. Up to version 3 each rank had a data file of its own."""
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
JsonObject: TypeAlias = Mapping[str, JsonValue]


@dataclass(frozen=True)
class RunProgress:
    """How far the run has come: optimizer steps, and what they consumed."""

    step: int
    samples: int
    tokens: int
    flops: int


@dataclass(frozen=True)
class DataRecord:
    """What a run reads, and which of the run's samples was the first of it.

    Phases of a run may read different data: each begins at the first sample of its own.
    """

    fingerprint: str = ""
    description: str = ""
    first_sample: int = 0
    left_out: tuple[tuple[int, int], ...] = ()
    """Parts of the data that --spike-policy rewind leaves out: first sample of the data, and how many."""

    def past_left_out(self, samples: int) -> "DataRecord":
        """Return the record by which the sample after `samples` of the run is none that is left out."""
        moved = self
        for first, count in sorted(self.left_out):
            within = samples - moved.first_sample - first
            if 0 <= within < count:
                moved = replace(moved, first_sample=moved.first_sample - (count - within))
        return moved


UNKNOWN_DATA = DataRecord()


@dataclass(frozen=True)
class Topology:
    """How many ranks wrote the checkpoint, and how they were arranged."""

    world_size: int
    pipe_size: int
    data_size: int
    tensor_size: int


@dataclass(frozen=True)
class GrownRegion:
    """A part of a tensor that a growth added, and Adam's step count at that growth."""

    tensor: str
    box: Box
    adam_step: int


@dataclass(frozen=True)
class OptimizerRecord:
    """The optimizer's own count of steps, and the hyper-parameters of each of its groups by name.

    Weights in `grown_regions` have taken `adam_step` steps fewer.
    """

    step_count: int
    groups: Mapping[str, JsonObject]
    grown_regions: Sequence[GrownRegion] = ()


@dataclass(frozen=True)
class EngineRecord:
    """The engine's counters: optimizer steps, samples, steps that were skipped."""

    global_steps: int
    global_samples: int
    skipped_steps: int


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint except its tensors; only the caller interprets `config` and `lineage`."""

    progress: RunProgress
    specs: Mapping[str, ParamSpec]
    optimizer: OptimizerRecord
    engine: EngineRecord
    topology: Topology
    config: JsonObject
    tokenizer_fingerprint: str
    lineage: Sequence[JsonObject]
    data: DataRecord = UNKNOWN_DATA
    prepend_bos: bool | None = None
    """Whether the documents that were trained on began with BOS; None: as the tokenizer's own files say."""
    files: Mapping[str, int] = field(default_factory=dict)
    """The length in bytes of every other file of the checkpoint, by name; `NewCheckpoint` fills it in."""
    format_version: int = FORMAT_VERSION


def spec_to_json(spec: ParamSpec) -> JsonObject:
    """Return a spec as JSON; `spec_from_json` reads it back."""
    return {
        "name": spec.name,
        "axes": [asdict(axis) for axis in spec.axes],
        "init": {"kind": type(spec.init).__name__.lower(), **asdict(spec.init)},
        "role": spec.role.value,
        "grown": [flow.value for flow in spec.growth_roles],
    }


def spec_from_json(raw: Mapping[str, Any]) -> ParamSpec:
    """Return the spec in parsed JSON. Raises KeyError, TypeError or ValueError if it is not one."""
    kinds: dict[str, type[Normal] | type[Constant]] = {"normal": Normal, "constant": Constant}
    init = dict(raw["init"])
    return ParamSpec(
        name=raw["name"],
        axes=tuple(Axis(**{**axis, "layout": Layout(axis["layout"])}) for axis in raw["axes"]),
        init=kinds[init.pop("kind")](**init),
        role=Role(raw["role"]),
        growth_roles=tuple(map(Flow, raw["grown"])),
    )


def _optimizer_from_json(raw: Mapping[str, Any]) -> OptimizerRecord:
    grown_regions = tuple(
        GrownRegion(
            entry["tensor"],
            Box(tuple(entry["box"]["offsets"]), tuple(entry["box"]["sizes"])),
            entry["adam_step" if "adam_step" in entry else "step_count"],
        )
        for entry in raw.get("grown_regions", raw.get("births"))  # their name in version 2
    )
    return OptimizerRecord(raw["step_count"], raw["groups"], grown_regions)


def _data_from_json(raw: object) -> DataRecord:
    record = record_of(DataRecord, raw)
    return replace(record, left_out=tuple((first, count) for first, count in record.left_out))


def manifest_to_json(manifest: Manifest) -> str:
    """Return the text of the manifest's file."""
    record = {
        "format_version": manifest.format_version,
        "progress": asdict(manifest.progress),
        "topology": asdict(manifest.topology),
        "optimizer": asdict(manifest.optimizer),
        "engine": asdict(manifest.engine),
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
        "lineage": manifest.lineage,
        "data": asdict(manifest.data),
        "prepend_bos": manifest.prepend_bos,
        "config": manifest.config,
        "files": manifest.files,
        "specs": [spec_to_json(spec) for spec in manifest.specs.values()],
    }
    return dumps_with_crc(record, indent=1)


def is_of_another_format(contents: bytes) -> bool:
    """Return whether a manifest states another format version than this one."""
    try:
        return bool(parse_json(contents)["format_version"] not in READABLE_VERSIONS)
    except (KeyError, TypeError, ValueError):
        return False


def read_manifest(folder: Location) -> Manifest:
    """Read the manifest of a checkpoint's folder.

    Raises CheckpointError: it is missing, damaged, or of another format.
    """
    path = folder / MANIFEST_FILE
    remedy = "a checkpoint without a manifest is incomplete: load another"
    with os_errors_as(CheckpointError, path, remedy):
        return parse_manifest(path.read_bytes(), path)


def parse_manifest(contents: bytes, path: Location) -> Manifest:
    """Return the manifest in the bytes of the file `path`. Raises CheckpointError, as `read_manifest`."""
    try:
        # Before the checksum is verified: another version may compute another one.
        version = parse_json(contents)["format_version"]
        if type(version) is not int:
            raise TypeError(f"format_version is {version!r:.80}")
        if version not in READABLE_VERSIONS:
            limit, remedy = f"older than {READABLE_VERSIONS[0]}, the oldest", ""
            if version > FORMAT_VERSION:
                limit, remedy = f"newer than {FORMAT_VERSION}, the newest", ", or a later one"
            raise CheckpointError(
                f"{path}: format version {version} is {limit} that this version of megatron_nexus reads: "
                f"load it with the version that wrote it{remedy}"
            )
        raw = loads_with_crc(contents)
        specs = [spec_from_json(spec) for spec in raw["specs"]]
        manifest = Manifest(
            progress=record_of(RunProgress, raw["progress"]),
            specs={spec.name: spec for spec in specs},
            optimizer=_optimizer_from_json(raw["optimizer"]),
            engine=record_of(EngineRecord, raw["engine"]),
            topology=record_of(Topology, raw["topology"]),
            config=raw["config"],
            tokenizer_fingerprint=raw["tokenizer_fingerprint"],
            lineage=raw["lineage"],
            data=_data_from_json(raw.get("data", {})),
            # Before this was recorded, all runs trained without BOS.
            prepend_bos=raw.get("prepend_bos", False if raw["progress"]["step"] else None),
            files=raw["files"] if version > 2 else {},
            format_version=version,
        )
        with_types(manifest.optimizer)
        return with_types(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error}): copy it again, or load another checkpoint"
        ) from error

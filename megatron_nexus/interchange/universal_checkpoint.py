"""DeepSpeed's universal checkpoint, as an export: what `load_universal` of DeepSpeed's own engines reads.

    FOLDER/latest_universal                                   the name of the folder below
    FOLDER/global_step40/mp_rank_00_model_states.pt           counters and client state, for ZeRO 1 and 2
    FOLDER/global_step40/zero_pp_rank_0_mp_rank_00_...        the same, for ZeRO 3
    FOLDER/global_step40/zero/optimizer_state.pt              hyper-parameters of the groups
    FOLDER/global_step40/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt

<parameter> is what the module that loads it calls a parameter. With a tensor goes the axis along which
tensor-parallel ranks cut it, in equal parts and without padding: such widths must divide by their number, but
for the vocabulary, which DeepSpeed pads. Its ZeRO 3 does not cut by tensor-parallel ranks, and hands one
count of steps to all buffers, each of which advances it under torch's AdamW: give each state a copy then.
Read from deepspeed 0.19.8, `checkpoint/universal_checkpoint.py`, `runtime/base_optimizer.py`,
`runtime/zero/stage3.py`, `runtime/engine.py`.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from megatron_nexus.checkpoint.chunks import full_box
from megatron_nexus.checkpoint.data_file import DTYPE, STATES
from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.checkpoint.non_finite import NonFiniteValues
from megatron_nexus.checkpoint.store import StateReader
from megatron_nexus.spec.param import Flow, Layout, ParamSpec

LATEST_FILE = "latest_universal"
UNIVERSAL_VERSION = 0.4
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def universal_bytes(specs: Mapping[str, ParamSpec]) -> int:
    """Return the bytes of all tensors."""
    return sum(spec.numel for spec in specs.values()) * DTYPE.itemsize * len(STATES)


def write_universal(
    folder: Path,
    reader: StateReader,
    names: Mapping[str, str],
    advance: Callable[[int], None],
    non_finite: NonFiniteValues,
) -> None:
    """Write the layout into `folder`, each parameter under the name that `names` has for it.

    Needs memory for the largest tensor, as DeepSpeed does to load it. The bytes written are passed to
    `advance`, the values to `non_finite`.

    Raises:
        CheckpointError: an element is not stored exactly once, or is damaged.
        OSError: a file cannot be written.
    """
    manifest = reader.manifest
    tag = f"global_step{manifest.progress.step}"
    zero = folder / tag / "zero"
    zero.mkdir(parents=True)
    # As torch's AdamW keeps it.
    count = torch.tensor(float(manifest.optimizer.step_count))
    for name, spec in manifest.specs.items():
        for state in STATES:
            held = reader.read_box(name, state, full_box(spec.shape))
            non_finite.add(name, held)
            values = torch.from_numpy(held)
            _save({"param": values, **_sharding(spec)}, zero / names[name] / f"{state}.pt")
            advance(values.numel() * DTYPE.itemsize)
        _save(count, zero / names[name] / "step.pt")
    _save(_optimizer_state(manifest, count), zero / "optimizer_state.pt")
    for name in MODEL_STATES:
        _save(_model_states(manifest), folder / tag / name)
    (folder / LATEST_FILE).write_text(tag)


def _sharding(spec: ParamSpec) -> dict[str, object]:
    cut = [i for i, axis in enumerate(spec.axes) if axis.layout in (Layout.SHARDED_PADDED, Layout.SHARDED)]
    metadata: dict[str, object] = {"cat_dim": cut[0] if cut else 0}
    if cut == [0] and spec.growth_roles[0] is Flow.BOUNDARY:
        metadata["vocab_tensor"] = True  # rows of zeros are added until they divide
    return metadata


def _optimizer_state(manifest: Manifest, count: Tensor) -> dict[str, object]:
    """Return the settings of the optimizer's groups, in their order, for ZeRO 1 and 2 and for ZeRO 3.

    ZeRO 3 gives every group the settings of the first: it gets those that all groups share.
    """
    groups: list[dict[str, object]] = []
    for name, settings in manifest.optimizer.groups.items():
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
        groups.append({"name": name, **values})
    shared = {
        key: value for key, value in groups[0].items() if all(group.get(key) == value for group in groups)
    }
    return {
        "ds_version": version("deepspeed"),
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": count}}, "param_groups": [shared]},
    }


def _model_states(manifest: Manifest) -> dict[str, object]:
    """Return the engine's counters; `load_checkpoint` returns all else as client state."""
    done = manifest.progress
    return {
        "ds_version": version("deepspeed"),
        "dp_world_size": manifest.topology.data_size,
        "mp_world_size": 1,  # the number of these files
        "global_steps": manifest.engine.global_steps,
        "global_samples": manifest.engine.global_samples,
        "skipped_steps": manifest.engine.skipped_steps,
        "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
        "iteration": done.step,
        "consumed_samples": done.samples,
        "consumed_tokens": done.tokens,
        "config": manifest.config,
    }


def _save(value: object, path: Path) -> None:
    """Pickle a value, which DeepSpeed unpickles. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    try:
        with path.open("wb") as file:  # torch raises RuntimeError for a path that it cannot write
            torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which torch's own clean-up hides
            raise error.__context__ from None
        raise

"""DeepSpeed's optimizer state as flat fragments of each parameter's local tensor, for every ZeRO stage.

DeepSpeed's private names, those of `gradient_reducer` too, are listed here. ZeRO-1, ZeRO-2 and BF16_Optimizer
flatten each parameter group and cut it into one range per data-parallel rank; ZeRO-3 cuts each parameter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron_nexus.checkpoint.chunks import fragment_boxes
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import EngineRecord, JsonObject, JsonValue
from megatron_nexus.checkpoint.train_state import StateView
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Shard

Parameters = Mapping[str, tuple[ParamSpec, nn.Parameter]]
"""The parameters of this rank's pipeline stage: logical name -> (spec, local tensor)."""

PRIVATE_NAMES: dict[type[ZeROOptimizer], tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: (
        "single_partition_of_fp32_groups",
        "update_lp_params",
        "_lazy_init_hp_params_optimizer_state",
        "bit16_groups",
        "bit16_groups_flat",
        "averaged_gradients",
        "reduce_gradients",
        "_build_compact_grad_partition_buffer",
        "_release_ipg_buffers",
        "params_in_partition",
        "scaled_global_norm",
        "_model_parallel_all_reduce",
        "unscale_and_clip_grads",
        "clip_grad",
    ),
    BF16_Optimizer: (
        "fp32_groups_flat_partition",
        "update_lp_params",
        "_lazy_init_hp_params_optimizer_state",
        "bf16_groups",
        "fp32_groups_gradients_flat",
        "fp32_groups_gradient_flat_partition",
        "immediate_grad_update",
        "get_grads_for_norm",
        "mpu",
        "_update_hp_grad",
        "clear_hp_grads",
        "fp32_groups_gradients",
        "fp32_groups_has_gradients",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        "fp32_partitioned_groups_flat",
        "grad_position",
        "get_param_id",
        "sub_group_to_group_id",
        "_get_param_partition_rank",
        "_reassign_or_swap_out_partitioned_parameters",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
    ),
}
PRIVATE_PARAMETER_NAMES: dict[type[ZeROOptimizer], tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: ("_hp_mapping",),
    BF16_Optimizer: ("_hp_mapping",),
    DeepSpeedZeroOptimizer_Stage3: ("ds_shape",),
}

HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay")


class DeepSpeedEngine(Protocol):
    """The part of `deepspeed.DeepSpeedEngine` and `PipelineEngine` that is used here."""

    module: nn.Module
    optimizer: ZeROOptimizer
    buffered_allreduce_fallback: Callable[..., None]
    global_steps: int
    global_samples: int
    skipped_steps: int
    micro_steps: int
    _INSTRUCTION_MAP: dict[type, Callable[..., None]]
    """Of a PipelineEngine alone."""

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        ...


@dataclass(frozen=True)
class _FragmentAddress:
    """Where the state of a part of a parameter lies: `count` elements from `position` of a flat buffer.

    The part begins at element `start` of the row-major local tensor.
    """

    local_shape: tuple[int, ...]
    start: int
    buffer: int
    position: int
    count: int


class ZeroState(ABC):
    """The `TrainState` of DeepSpeed: the master weights and moments that one rank's optimizer holds.

    Adam's moments are created where it has not stepped yet.
    """

    def __init__(self, engine: DeepSpeedEngine, parameters: Parameters, shard: Shard) -> None:
        """`parameters` are those of this rank's pipeline stage, of which it holds the part `shard`."""
        self._engine = engine
        self._parameters = parameters
        self._shard = shard
        self._zero = engine.optimizer
        self._adam: torch.optim.Optimizer = engine.optimizer.optimizer
        # torch and DeepSpeed count the steps of each buffer, NVIDIA's apex those of each group.
        self._counts_groups = type(self._adam).__module__.partition(".")[0] == "apex"
        self._make_moments()

    @property
    @abstractmethod
    def _flats(self) -> list[tuple[Tensor, int]]:
        """Return each flat fp32 buffer with the index of its parameter group."""

    @abstractmethod
    def _address(self, parameter: nn.Parameter) -> _FragmentAddress | None:
        """Return where the parameter's fragment lies; None if this rank has none."""

    @abstractmethod
    def refresh_model(self) -> None:
        """Cast the loaded master weights into the model's parameters; a collective call."""

    def _make_moments(self) -> None:
        """Give Adam the state that its first step would make, where it has none yet."""
        for flat, group in self._flats:
            if not self._adam.state[flat]:
                moments = {state: torch.zeros_like(flat.detach()) for state in ("exp_avg", "exp_avg_sq")}
                self._adam.state[flat] = moments
            self._counter(flat, group).setdefault("step", self._no_steps(flat, group))

    def _no_steps(self, flat: Tensor, group: int) -> Tensor | int:
        """Return a step count of zero as this optimizer keeps it: a tensor in torch, else a number."""
        if not isinstance(self._adam, torch.optim.AdamW):
            return 0
        settings = self._adam.param_groups[group]
        on_device = settings.get("fused") or settings.get("capturable")
        return torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")

    def _counter(self, flat: Tensor, group: int) -> dict[str, Tensor | int]:
        """Return what holds, under "step", the step count of a buffer."""
        return self._adam.param_groups[group] if self._counts_groups else self._adam.state[flat]

    @property
    def specs(self) -> dict[str, ParamSpec]:
        return {name: spec for name, (spec, _) in self._parameters.items()}

    @property
    def counters(self) -> EngineRecord:
        """DeepSpeed's counters, between two optimizer steps."""
        engine = self._engine
        assert engine.micro_steps % engine.gradient_accumulation_steps() == 0, "gradients would be lost"
        return EngineRecord(engine.global_steps, engine.global_samples, engine.skipped_steps)

    @counters.setter
    def counters(self, saved: EngineRecord) -> None:
        engine = self._engine
        engine.global_steps = saved.global_steps
        engine.global_samples = saved.global_samples
        engine.skipped_steps = saved.skipped_steps
        # Recounted: the number of micro-batches in a step may have changed with the topology.
        engine.micro_steps = saved.global_steps * engine.gradient_accumulation_steps()

    def views(self) -> Iterator[StateView]:
        for spec, parameter in self._parameters.values():
            if (address := self._address(parameter)) is None:
                continue
            held, expected = address.local_shape, self._shard.local_shape(spec)
            assert held == expected, f"{spec.name} has the local shape {held}, its spec says {expected}"
            buffers = self._buffers(self._flats[address.buffer][0])
            for part in fragment_boxes(spec, self._shard, address.start, address.count):
                first = address.position + part.start
                run = slice(first, first + prod(part.stored))
                runs = {state: whole[run].view(part.stored) for state, whole in buffers.items()}
                corner = part.box.index_at_origin
                yield StateView(spec, part.box, {state: held[corner] for state, held in runs.items()})

    def _buffers(self, flat: Tensor) -> dict[str, Tensor]:
        held = {"fp32": flat.detach(), **self._adam.state[flat]}
        return {state: held[state] for state in STATES}

    def clear(self) -> None:
        for flat, _ in self._flats:
            for buffer in self._buffers(flat).values():
                buffer.zero_()

    def forget_moments(self) -> None:
        """Reset the optimizer: moments and step count are zero, weights stay."""
        for flat, _ in self._flats:
            for state, buffer in self._buffers(flat).items():
                if state != "fp32":
                    buffer.zero_()
        self.step_count = 0

    def around_each_step(
        self, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
    ) -> None:
        """Call `before(optimizer, ...)` and `after(optimizer, ...)` whenever Adam steps.

        `after` comes before weights are cast for the model, in the order in which hooks were given.
        """
        if before is not None:
            self._adam.register_step_pre_hook(before)
        if after is not None:
            self._adam.register_step_post_hook(after)

    @property
    def step_count(self) -> int:
        """Adam's count of steps, which all buffers share."""
        counts = {int(self._counter(flat, group)["step"]) for flat, group in self._flats}
        assert len(counts) == 1, f"the optimizer's buffers disagree about its steps: {sorted(counts)}"
        return counts.pop()

    @step_count.setter
    def step_count(self, count: int) -> None:
        for flat, group in self._flats:
            counter = self._counter(flat, group)
            if isinstance(counter["step"], Tensor):
                counter["step"].fill_(count)
            else:
                counter["step"] = count

    @property
    def groups(self) -> dict[str, JsonObject]:
        return {
            group["name"]: {key: _plain(group[key]) for key in HYPER_PARAMETERS}
            for group in self._adam.param_groups
        }

    def restore_groups(self, groups: Mapping[str, JsonObject]) -> None:
        missing = self.groups.keys() - groups.keys()
        if missing:
            raise CheckpointError(
                f"the checkpoint has no optimizer group {', '.join(sorted(missing))}, only "
                f"{', '.join(sorted(groups))}: name the groups as when it was written"
            )
        for group in self._adam.param_groups:
            for key in HYPER_PARAMETERS:
                saved = groups[group["name"]][key]
                group[key] = tuple(saved) if isinstance(saved, list) else saved


def _plain(value: float | Tensor | tuple[float | Tensor, ...]) -> JsonValue:
    if isinstance(value, (tuple, list)):
        return [float(item) for item in value]
    return float(value)


class _FlatGroupState(ZeroState):
    """ZeRO-1, ZeRO-2, BF16_Optimizer: a rank holds one range of each flattened parameter group."""

    @property
    def _flats(self) -> list[tuple[Tensor, int]]:
        is_bf16 = isinstance(self._zero, BF16_Optimizer)
        name = "fp32_groups_flat_partition" if is_bf16 else "single_partition_of_fp32_groups"
        return [(flat, group) for group, flat in enumerate(getattr(self._zero, name))]

    def _address(self, parameter: nn.Parameter) -> _FragmentAddress | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # hung on by DeepSpeed
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return _FragmentAddress(
            tuple(parameter.shape), low.start, mapping.param_group_index, high.start, high.numel
        )

    def refresh_model(self) -> None:
        self._zero._lazy_init_hp_params_optimizer_state()
        self._zero.update_lp_params()


class _PerParameterState(ZeroState):
    """ZeRO-3: a rank holds one range of every parameter, padded to equal lengths."""

    @property
    def _flats(self) -> list[tuple[Tensor, int]]:
        groups = self._zero.sub_group_to_group_id
        return [(flat, groups[i]) for i, flat in enumerate(self._zero.fp32_partitioned_groups_flat)]

    def _address(self, parameter: nn.Parameter) -> _FragmentAddress | None:
        # ZeRO-3 flattens each parameter and cuts it into equal ranges of `padded` elements, rank r has those
        # from r * padded on. The ranges of many parameters follow each other in a flat buffer: `index` says
        # in which, `position` where. A range that begins beyond the parameter's end is padding alone.
        index, position, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        local_shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]  # hung on by DeepSpeed
        start = self._zero._get_param_partition_rank(parameter) * padded
        count = min(padded, prod(local_shape) - start)
        return _FragmentAddress(local_shape, start, index, position, count) if count > 0 else None

    def refresh_model(self) -> None:
        self._zero.checkpoint_event_prologue()
        for index in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero.checkpoint_event_epilogue()


def zero_state(engine: DeepSpeedEngine, parameters: Parameters, shard: Shard) -> ZeroState:
    """Return the training state of a DeepSpeed engine, for the ZeRO stage of its optimizer."""
    optimizer = engine.optimizer
    kind = type(optimizer)
    assert kind in PRIVATE_NAMES, f"{kind.__name__} keeps no fp32 master copy that a checkpoint could hold"
    missing = [name for name in PRIVATE_NAMES[kind] if not hasattr(optimizer, name)]
    assert not missing, f"{kind.__name__} of this DeepSpeed has no {missing}: install the pinned version"
    state = _PerParameterState if kind is DeepSpeedZeroOptimizer_Stage3 else _FlatGroupState
    return state(engine, parameters, shard)


def memory_address(view: Tensor) -> int:
    """Return the address of the memory that a view is of."""
    return view.untyped_storage().data_ptr()

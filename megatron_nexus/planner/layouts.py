"""Search: the layouts of a run on a number of devices that fit in memory, the fastest first by prediction.

Of each tensor-parallel size and recompute two micro-batches are traced; the work of all others is affine in
their size. The memory of those that come first is planned in full.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from megatron_nexus.config.devices import Device
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import Recompute, RunConfig
from megatron_nexus.errors import ConfigError
from megatron_nexus.planner.layer_work import Work, work_by_micro_batch
from megatron_nexus.planner.memory import plan_memory, plan_state, stage_ranges
from megatron_nexus.planner.step_time import StepTime, step_time

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
MOST_TENSOR_PARALLEL = 64


@dataclass(frozen=True)
class Layout:
    """What a search may change of a run."""

    tp: int
    pp: int
    micro_batch_size: int
    recompute: Recompute
    zero_stage: int
    sequence_parallel: bool

    @classmethod
    def of(cls, config: RunConfig) -> "Layout":
        """Return the layout that a run has."""
        parallel, training = config.parallel, config.training
        return cls(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            training.micro_batch_size,
            training.recompute_granularity,
            max(1, parallel.zero_stage),
            parallel.sequence_parallel,
        )

    def applied(self, config: RunConfig) -> RunConfig:
        """Return a run in this layout."""
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            zero_stage=self.zero_stage,
            sequence_parallel=self.sequence_parallel,
        )
        training = replace(
            config.training,
            micro_batch_size=self.micro_batch_size,
            recompute_granularity=self.recompute,
        )
        return replace(config, parallel=parallel, training=training)

    def flags(self) -> dict[str, str]:
        """Return the flags that say it, by what they are about."""
        return {
            "tp": f"--tp {self.tp}",
            "pp": f"--pp {self.pp}",
            "micro_batch_size": f"--micro-batch-size {self.micro_batch_size}",
            "recompute": f"--recompute-granularity {self.recompute}",
            "zero_stage": f"--zero-stage {self.zero_stage}",
            "sequence_parallel": f"--{'' if self.sequence_parallel else 'no-'}sequence-parallel",
        }

    def changes(self, other: "Layout") -> list[str]:
        """Return the flags by which it differs from another."""
        return [flag for name, flag in self.flags().items() if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Candidate:
    """A layout, its predicted time, and the most memory that a rank needs."""

    layout: Layout
    world_size: int
    time: StepTime
    peak_bytes: int


def layouts(config: RunConfig, world_size: int, device: Device) -> Iterator[Layout]:
    """Yield every layout that the rules allow; tensor parallelism stays within a node."""
    own = Layout.of(config)
    most = min(world_size, int(device.gpus_per_node), MOST_TENSOR_PARALLEL)
    for tp in filter(lambda tp: world_size % tp == 0, range(1, most + 1)):
        for pp in range(1, min(world_size // tp, config.model.num_layers) + 1):
            if (world_size // tp) % pp:
                continue
            copies = world_size // tp // pp
            for size in sorted({*MICRO_BATCHES, own.micro_batch_size}):
                if config.training.global_batch_size % (size * copies):
                    continue
                for zero_stage in (1, 2, 3) if pp == 1 and copies > 1 else (1,):
                    for recompute in RECOMPUTES:
                        layout = Layout(tp, pp, size, recompute, zero_stage, tp > 1)
                        if _is_allowed(layout.applied(config), world_size):
                            yield layout


def _is_allowed(config: RunConfig, world_size: int) -> bool:
    try:
        check(config, world_size)
    except ConfigError:
        return False
    return True


class Search:
    """Candidates of one run on one kind of device."""

    def __init__(self, config: RunConfig, device: Device) -> None:
        self.config = config
        self.device = device
        self._work: Callable[[Layout], Callable[[int], Work]] = cache(
            lambda layout: work_by_micro_batch(layout.applied(config))
        )

    def fastest(self, world_size: int, count: int) -> list[Candidate]:
        """Return the layouts that fit, the fastest first."""
        return self._first_that_fit(world_size, count, lambda layout, time: (time.total_s,))

    def least_change(self, world_size: int) -> Candidate | None:
        """Return of the layouts that fit the one with the fewest changes, of several the fastest."""
        own = Layout.of(self.config)
        found = self._first_that_fit(
            world_size, 1, lambda layout, time: (len(layout.changes(own)), time.total_s)
        )
        return found[0] if found else None

    def _first_that_fit(
        self, world_size: int, count: int, order: Callable[[Layout, StepTime], tuple[float, ...]]
    ) -> list[Candidate]:
        timed = []
        for layout in layouts(self.config, world_size, self.device):
            config, work = layout.applied(self.config), self._work_of(layout)
            time = step_time(config, world_size, self.device, work)
            timed.append((order(layout, time), layout, time, work))
        timed.sort(key=lambda one: one[0])
        found: list[Candidate] = []
        for _, layout, time, work in timed:
            if len(found) == count:
                break
            config = layout.applied(self.config)
            if _least_bytes(config, world_size, work) > self.device.usable_bytes:
                continue
            peak = max(memory.peak for memory in plan_memory(config, world_size, "cuda"))
            if peak <= self.device.usable_bytes:
                found.append(Candidate(layout, world_size, time, peak))
        return found

    def _work_of(self, layout: Layout) -> Work:
        """The work of a micro-batch, which neither the pipeline nor ZeRO changes."""
        return self._work(replace(layout, pp=1, zero_stage=1, micro_batch_size=1))(layout.micro_batch_size)


def _least_bytes(config: RunConfig, world_size: int, work: Work) -> float:
    """Return what a rank holds at least: its states, and what forward keeps of micro-batches in flight."""
    most = 0.0
    stages = stage_ranges(config)
    micro_batches = config.accumulation_steps(world_size)
    for stage, (layers, state) in enumerate(zip(stages, plan_state(config, world_size, "cuda"), strict=True)):
        kept = sum(times * one.kept_bytes for times, one in work.of_layers(layers, config.model.num_layers))
        in_flight = min(len(stages) - stage, micro_batches)
        # States count gradients that may not be there yet.
        most = max(most, state["weights"] + state["optimizer"] + in_flight * kept)
    return most

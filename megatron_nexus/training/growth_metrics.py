"""Growth metrics: the new elements and units of a grown model compared with the old ones, by tensor.

Every --growth-metrics-interval steps, at any topology and ZeRO stage, equal to those of one process up to the
order of sums. New is what the latest growth added, as the checkpoint's lineage says; without a growth there
are only the numbers of all elements, as "old". Of each tensor:

    elements, grad_rms, weight_rms, update_rms    old and new: of the clipped gradient that Adam gets, of the
                                                  weights before the step, of what the step changes
    grad_ratio                                    grad_rms of new elements over that of old ones
    update_ratio                                  update_rms / weight_rms, old and new
    of matrices, after the step: `matrix_statistics.MATRIX_NUMBERS`, and SOURCE_NUMBERS where rows are copies
    units, pre_rms, post_rms, dead_share          of the units that a matrix reads behind an activation: RMS
                                                  before and after it, share of dead ones (`unit_statistics`)

A number that does not exist is left out, as the ratio to weights that are all zero. The units are those of a
forward pass over one global batch, the first samples of the training data, each time the same: a third of a
step. The matrices are put together one after the other, by turns on each rank of a stage. Ranks of large ones
are found in the first measurement of a process and every `matrix_statistics.RANKS_EVERY`-th after it.
"""

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.blend import Blend
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.element_statistics import ElementStatistics, Square
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.grown_elements import GrownElements
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.matrix_statistics import (
    MATRIX_NUMBERS,
    RANKS_EVERY,
    SOURCE_NUMBERS,
    copied_matrices,
    matrix_numbers,
    own_matrices,
    source_numbers,
)
from megatron_nexus.training.metrics import GrowthMetrics, StepMetrics
from megatron_nexus.training.rank_batches import rank_batches
from megatron_nexus.training.unit_statistics import Unit, UnitStatistics

SIDES = ("old", "new")


class GrowthMetricsHook(Hook):
    """Measures in the steps that are due, and hands what it finds to the other hooks; on all ranks."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        engine: Engine,
        samples: Blend | AnswerBatches,
        elements: Mapping[str, GrownElements],
        hooks: Sequence[Hook],
        step: int,
    ) -> None:
        """The first of `samples` are the text of the forward pass; `step` is the last one taken."""
        self._config = config
        self._mesh = mesh
        self._engine = engine
        self._samples = samples
        self._elements = elements
        self._hooks = hooks
        self._interval = config.logging.growth_metrics_interval
        self._of_elements = ElementStatistics(engine.state, elements, mesh.tp_rank == 0, mesh.device)
        self._measured = 0
        #: [tensors]: the pipeline stage of each.
        stages = torch.zeros(len(elements), dtype=torch.int64)
        if mesh.dp_rank == mesh.tp_rank == 0:
            stages = torch.tensor([mesh.pp_rank * (name in engine.state.specs) for name in elements])
        mesh.control.all_reduce(stages)
        self._stages = dict(zip(elements, stages.tolist(), strict=True))
        self._expect(step + 1)

    def _expect(self, step: int) -> None:
        self._of_elements.enabled = step % self._interval == 0

    def after_step(self, metrics: StepMetrics) -> None:
        """Finish the metrics of this step where they are due; a collective call."""
        if self._of_elements.enabled:
            found = self._measure(metrics.step)
            for hook in self._hooks:
                hook.after_evaluation(found)
        self._expect(metrics.step + 1)

    def after_rewind(self, step: int, record: Mapping[str, object]) -> None:
        self._expect(step + 1)

    @torch.no_grad()
    def _measure(self, step: int) -> GrowthMetrics:
        began, mesh = time.perf_counter(), self._mesh
        count = self._config.accumulation_steps(mesh.world_size)
        units = UnitStatistics(self._engine.parameters)
        batches = rank_batches(self._config, mesh, self._samples, 0)
        self._engine.observe_activations(batches, count, units)
        numbers = {name: number for number, name in enumerate(self._elements)}
        sums = [self._of_elements.sums.cpu(), self._matrices(numbers), units.sums(self._elements, mesh).cpu()]
        together = torch.cat([part.flatten(1) for part in sums], dim=1)
        self._of_elements.sums.zero_()
        mesh.control.all_reduce(together)
        parts = together.split([part.flatten(1).shape[1] for part in sums], dim=1)
        tensors = {}
        for name, i in numbers.items():
            if self._elements[name].spec.numel:
                of_matrix = dict(zip(MATRIX_NUMBERS + SOURCE_NUMBERS, parts[1][i].tolist(), strict=True))
                tensors[name] = _numbers(parts[0][i].view(2, -1), of_matrix, parts[2][i].view(2, -1))
        return GrowthMetrics(step, time.perf_counter() - began, tensors)

    def _matrices(self, numbers: Mapping[str, int]) -> Tensor:
        """Return [tensors, MATRIX_NUMBERS + SOURCE_NUMBERS]: 0 where another rank has them, NaN for none."""
        mesh, state, split = self._mesh, self._engine.state, len(MATRIX_NUMBERS)
        found = torch.zeros(len(numbers), split + len(SOURCE_NUMBERS), dtype=torch.float64)
        if mesh.rank == 0:
            for name, row in numbers.items():
                found[row, : split * (len(self._elements[name].spec.axes) != 2)] = torch.nan
                if not self._elements[name].source:
                    found[row, split:] = torch.nan
        with_ranks = self._measured % RANKS_EVERY == 0
        self._measured += 1
        for name, matrix in own_matrices(state, self._elements, mesh):
            rows, columns = (self._elements[name].new_units(axis).to(mesh.device) for axis in (0, 1))
            found[numbers[name], :split] = torch.tensor(matrix_numbers(matrix, rows, columns, with_ranks))
        for name, matrix, source in copied_matrices(state, self._elements, self._stages, mesh):
            of = source_numbers(matrix, source, self._elements[name].copies)
            found[numbers[name], split:] = torch.tensor(of)
        return found


def _numbers(elements: Tensor, matrix: Mapping[str, float], units: Tensor) -> dict[str, float]:
    """Return the numbers of a tensor that exist, by name."""
    made: dict[str, float] = {}
    squares = {"grad": Square.GRADIENT, "weight": Square.WEIGHT, "update": Square.UPDATE}
    for side, sums, of_units in zip(SIDES, elements.tolist(), units.tolist(), strict=True):
        if count := sums[Square.COUNT]:
            made[f"elements_{side}"] = count
            for name, square in squares.items():
                made[f"{name}_rms_{side}"] = math.sqrt(sums[square] / count)
            if weight := made[f"weight_rms_{side}"]:
                made[f"update_ratio_{side}"] = made[f"update_rms_{side}"] / weight
        if count := of_units[Unit.COUNT]:
            made[f"units_{side}"] = count
            made[f"pre_rms_{side}"] = math.sqrt(of_units[Unit.BEFORE] / count)
            made[f"post_rms_{side}"] = math.sqrt(of_units[Unit.AFTER] / count)
            made[f"dead_share_{side}"] = of_units[Unit.DEAD] / count
    if "grad_rms_new" in made and made.get("grad_rms_old"):
        made["grad_ratio"] = made["grad_rms_new"] / made["grad_rms_old"]
    made |= matrix
    return {name: float(f"{value:.6g}") for name, value in made.items() if math.isfinite(value)}

"""Growth metrics: the new elements and units of a grown model compared with the old ones, by tensor.

Every --growth-metrics-interval steps, at any topology and ZeRO stage, equal to those of one process up to the
order of sums. New is what the latest growth added, as the checkpoint's lineage says; without a growth there
are only the numbers of all elements, as "old". Of each tensor:

    elements, grad_rms, weight_rms, update_rms    old and new: of the clipped gradient that Adam gets, of the
                                                  weights before the step, of what the step changes
    grad_ratio                                    grad_rms of new elements over that of old ones
    update_ratio                                  update_rms / weight_rms, old and new
    of matrices, after the step: `matrix_statistics.MATRIX_NUMBERS`
    units, pre_rms, post_rms, dead_share          of the units that a matrix reads behind an activation: RMS
                                                  before and after it, share of dead ones (`unit_statistics`)

A number that does not exist is left out, as the ratio to weights that are all zero. The units are those of a
forward pass over one global batch, the first samples of the training data, each time the same: a third of a
step. The matrices are put together one after the other, by turns on each rank of a stage.
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
from megatron_nexus.training.matrix_statistics import MATRIX_NUMBERS, matrix_numbers, new_axes, own_matrices
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
        """Go on after the step that the run has gone back to."""
        self._expect(step + 1)

    @torch.no_grad()
    def _measure(self, step: int) -> GrowthMetrics:
        began, mesh = time.perf_counter(), self._mesh
        count = self._config.accumulation_steps(mesh.world_size)
        units = UnitStatistics(self._engine.parameters)
        batches = rank_batches(self._config, mesh, self._samples, 0)
        self._engine.observe_activations(batches, count, units)
        matrices = torch.zeros(len(self._elements), len(MATRIX_NUMBERS), dtype=torch.float64)
        numbers = {name: number for number, name in enumerate(self._elements)}
        for name, matrix in own_matrices(self._engine.state, self._elements, mesh):
            found = matrix_numbers(matrix, *new_axes(self._elements[name], mesh.device))
            matrices[numbers[name]] = torch.tensor(found, dtype=torch.float64)
        sums = [self._of_elements.sums.cpu(), matrices, units.sums(self._elements, mesh).cpu()]
        together = torch.cat([part.flatten(1) for part in sums], dim=1)
        self._of_elements.sums.zero_()
        mesh.control.all_reduce(together)
        parts = together.split([part.flatten(1).shape[1] for part in sums], dim=1)
        tensors = {
            name: _numbers(parts[0][i].view(2, -1), parts[1][i], parts[2][i].view(2, -1))
            for name, i in numbers.items()
            if self._elements[name].spec.numel
        }
        return GrowthMetrics(step, time.perf_counter() - began, tensors)


def _numbers(elements: Tensor, matrix: Tensor, units: Tensor) -> dict[str, float]:
    """Return the numbers of a tensor that exist, by name."""
    made: dict[str, float] = {}
    rms: dict[str, float] = {}
    for side, sums, of_units in zip(SIDES, elements.tolist(), units.tolist(), strict=True):
        if count := sums[Square.COUNT]:
            made[f"elements_{side}"] = count
            for name in (Square.GRADIENT, Square.WEIGHT, Square.UPDATE):
                rms[f"{name.name}_{side}"] = math.sqrt(sums[name] / count)
            made[f"grad_rms_{side}"] = rms[f"GRADIENT_{side}"]
            made[f"weight_rms_{side}"] = rms[f"WEIGHT_{side}"]
            made[f"update_rms_{side}"] = rms[f"UPDATE_{side}"]
            if rms[f"WEIGHT_{side}"]:
                made[f"update_ratio_{side}"] = rms[f"UPDATE_{side}"] / rms[f"WEIGHT_{side}"]
        if count := of_units[Unit.COUNT]:
            made[f"units_{side}"] = count
            made[f"pre_rms_{side}"] = math.sqrt(of_units[Unit.BEFORE] / count)
            made[f"post_rms_{side}"] = math.sqrt(of_units[Unit.AFTER] / count)
            made[f"dead_share_{side}"] = of_units[Unit.DEAD] / count
    if "GRADIENT_new" in rms and rms.get("GRADIENT_old"):
        made["grad_ratio"] = rms["GRADIENT_new"] / rms["GRADIENT_old"]
    made |= dict(zip(MATRIX_NUMBERS, matrix.tolist(), strict=True)) if matrix.any() else {}
    return {name: float(f"{value:.6g}") for name, value in made.items() if math.isfinite(value)}

"""One rank of the tests of growth metrics: trains each given case from a checkpoint, and records them.

Usage: growth_metrics_worker.py CASES.json OUT_FOLDER; the launcher's variables come from the environment.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np

from megatron_nexus.checkpoint.resume import load_checkpoint
from megatron_nexus.config.command_line import build
from megatron_nexus.config.rules import check
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.grown_adam import install_bias_correction
from megatron_nexus.training.grown_elements import grown_elements
from megatron_nexus.training.growth_metrics import GrowthMetricsHook
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import Evaluation, GrowthMetrics, StepMetrics
from megatron_nexus.training.optimizer import configure_groups
from tests.support.batches import STEPS, Batch, global_batches
from tests.support.train_worker import my_batches
from tests.support.waiting import TIMEOUT_S
from tests.support.warm_server import call_in_fork


class Samples:
    """The samples of global batches, one after the other, as the loader reads them."""

    def __init__(self, batches: list[Batch]) -> None:
        self.rows = np.concatenate(
            [np.concatenate([tokens, labels[:, -1:]], axis=1) for tokens, labels in batches]
        )

    def sample(self, number: int) -> np.ndarray:
        return self.rows[number]


class Kept(Hook):
    def __init__(self) -> None:
        self.found: list[GrowthMetrics] = []

    def after_evaluation(self, found: Evaluation) -> None:
        assert isinstance(found, GrowthMetrics)
        self.found.append(found)


def run_case(case: dict, out: Path, index: int) -> None:
    config = build(case["flags"])
    world = read_world(os.environ)
    world = dataclasses.replace(world, master_port=world.master_port + index)
    check(config, world.size)
    parallel, training = config.parallel, config.training
    mesh = make_mesh(
        world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, TIMEOUT_S
    )
    engine = Engine(config, mesh)
    manifest = load_checkpoint(Path(case["load"]), engine.state, mesh)
    configure_groups(engine.optimizer.param_groups, config.optimizer)  # those saved have another epsilon
    install_bias_correction(engine.state, manifest.optimizer.grown_regions)
    batches = global_batches(config.model.vocab_size, training.global_batch_size, training.seq_length)
    kept, hooks = Kept(), []
    if config.logging.growth_metrics_interval:
        elements = grown_elements(config.model, manifest.lineage)
        hooks = [GrowthMetricsHook(config, mesh, engine, Samples(batches), elements, [kept], 0)]
    losses = []
    mine = my_batches(batches, training.micro_batch_size, mesh, None)
    for step in range(1, STEPS + 1):
        result = engine.train_step(mine, config.optimizer.lr)
        losses.append(result.loss)
        metrics = StepMetrics(step, result.loss, 0.0, result.grad_norm, 0, 1.0, 1.0, 0.0, None, 0)
        for hook in hooks:
            hook.after_step(metrics)
    record = {"losses": losses, "found": [dataclasses.asdict(found) for found in kept.found]}
    (out / f"{case['name']}-{mesh.rank}.json").write_text(json.dumps(record))
    close_mesh()


def main() -> None:
    for index, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        call_in_fork(run_case, case, Path(sys.argv[2]), index)


if __name__ == "__main__":
    main()

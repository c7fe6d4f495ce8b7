"""One rank that has DeepSpeed itself load universal checkpoints, and records what it made of them.

Usage: universal_worker.py CASES.json OUT_FOLDER; the launcher's variables come from the environment. Each
case is loaded twice, by DeepSpeed from the export and by this package from the source, saved and trained.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from megatron_nexus.checkpoint.manifest import RunProgress
from megatron_nexus.checkpoint.resume import load_checkpoint
from megatron_nexus.checkpoint.writer import SaveRequest
from megatron_nexus.config.command_line import build
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training import engine as engine_module
from megatron_nexus.training.engine import Engine
from tests.support import train_worker
from tests.support.batches import global_batches
from tests.support.warm_server import call_in_fork

derived_config = engine_module.deepspeed_config


def load(case: dict, how: str, out: Path, index: int) -> None:
    config = build(case["flags"])
    world = read_world(os.environ)
    world = dataclasses.replace(world, master_port=world.master_port + index)
    parallel, training = config.parallel, config.training
    mesh = make_mesh(world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, 120.0)
    universal = {"checkpoint": {"load_universal": how == "deepspeed"}}
    engine_module.deepspeed_config = lambda *given: {**derived_config(*given), **universal}
    engine = Engine(config, mesh)
    if how == "deepspeed":
        _, client = engine.deepspeed.load_checkpoint(case["universal"], load_lr_scheduler_states=False)
        if parallel.zero_stage == 3:  # which hands one count to all buffers: each would advance it
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
    else:
        load_checkpoint(Path(case["source"]), engine.state, mesh)
        client = {}
    folder = out / case["name"] / how
    train_worker.save(engine, mesh, folder, SaveRequest(RunProgress(40, 0, 0, 0), {}, ""))
    batches = global_batches(config.model.vocab_size, training.global_batch_size, training.seq_length)
    mine = train_worker.my_batches(batches, training.micro_batch_size, mesh, None)
    losses = [engine.train_step(mine, 1e-3).loss for _ in range(2)]
    groups = [
        {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        for group in engine.optimizer.param_groups
    ]
    close_mesh()
    record = {"losses": losses, "groups": groups, "iteration": client.get("iteration")}
    (out / case["name"] / f"{how}_{mesh.rank}.json").write_text(json.dumps(record))


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for number, case in enumerate(cases):
        for i, how in enumerate(("deepspeed", "package")):
            call_in_fork(load, case, how, out, 2 * number + i)


if __name__ == "__main__":
    main()

"""One rank of the laws of sample gradients: sketches the samples of each case at its topology.

Usage: sketch_worker.py CASES.json OUT_FOLDER; the launcher's variables come from the environment. Of a case
with a ZeRO stage an engine of that stage first writes a checkpoint, and that is sketched.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_nexus.analysis.sample_gradients import SampleGradients
from megatron_nexus.checkpoint.manifest import RunProgress
from megatron_nexus.checkpoint.resume import load_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.checkpoint.writer import SaveRequest
from megatron_nexus.config.command_line import build
from megatron_nexus.data.answers import AnswerTokens
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.engine import Engine
from tests.support import train_worker
from tests.support.waiting import TIMEOUT_S
from tests.support.warm_server import call_in_fork


def written_by(zero_stage: int, case: dict, mesh: Mesh, out: Path) -> Path:
    """The checkpoint of a case as an engine of that stage writes it."""
    engine = Engine(build({**case["flags"], "zero_stage": zero_stage}), mesh, init_weights=False)
    load_checkpoint(Path(case["load"]), engine.state, mesh)
    folder = out / case["name"]
    train_worker.save(engine, mesh, folder, SaveRequest(RunProgress(40, 0, 0, 0), {}, ""))
    return next(folder.glob("iter_*"))


def run_case(case: dict, out: Path, number: int) -> None:
    world = read_world(os.environ)
    world = dataclasses.replace(world, master_port=world.master_port + number)
    mesh = make_mesh(world, case["tp"], case["pp"], TIMEOUT_S)
    load = written_by(case["zero"], case, mesh, out) if case["zero"] else Path(case["load"])
    config = build(case["flags"])
    reader = CheckpointReader(load)
    model = SampleGradients(reader, config, mesh, torch.float64, case["size"], 5, *case["options"])
    sketches = model.sketch([AnswerTokens(tuple(ids), start) for ids, start in case["samples"]])
    np.save(out / f"{case['name']}-{mesh.rank}.npy", sketches.numpy())
    close_mesh()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for number, case in enumerate(cases):
        call_in_fork(run_case, case, out, number)


if __name__ == "__main__":
    main()

"""One rank of the parity tests: trains each given case for a few steps and records what it saw.

Usage: train_worker.py CASES.json OUT_FOLDER; the launcher's variables come from the environment.
"""

import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from megatron_nexus.checkpoint.manifest import RunProgress, read_manifest
from megatron_nexus.checkpoint.resume import load_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.checkpoint.writer import CheckpointWriter, SaveRequest
from megatron_nexus.config.command_line import build
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.growth.generations import newest_regions
from megatron_nexus.growth.grown_reader import GrownReader
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import read_request
from megatron_nexus.models import decoder
from megatron_nexus.models.packing import Stream
from megatron_nexus.models.scores import Request
from megatron_nexus.parallel.beacon import Beacon
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training import stage_module
from megatron_nexus.training.deepspeed_adam import build_deepspeed_adam
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.grown_adam import install_bias_correction
from megatron_nexus.training.new_lr import install_new_lr
from megatron_nexus.training.scoring import DistributedScorer, TaskEvaluator
from tests.support.batches import STEPS, Batch, document_positions, global_batches, scoring_requests
from tests.support.waiting import TIMEOUT_S
from tests.support.warm_server import call_in_fork


def evaluator_of(requests: list[Request]) -> TaskEvaluator:
    """Asks for the scores of `requests`, and hands them on as they are."""
    return lambda scorer: {"all": {"": [dataclasses.astuple(score) for score in scorer.score(requests)]}}


def my_batches(
    batches: list[Batch], micro: int, mesh: Mesh, positions: Tensor | None
) -> Iterator[tuple[Stream, Tensor]]:
    for tokens, labels in batches:
        for first in range(mesh.dp_rank * micro, len(tokens), mesh.dp_size * micro):
            mine = slice(first, first + micro)
            yield tokens[mine] if positions is None else (tokens[mine], positions[mine]), labels[mine]


def padding_of(engine: Engine) -> float:
    """The largest element in the padding of this rank's parameters; 0 where ZeRO-3 holds them cut up."""
    largest = 0.0
    for spec, parameter in engine.parameters.values():
        if parameter.shape == engine.shard.local_shape(spec):
            padding = parameter.detach().clone()
            padding[tuple(slice(0, size) for size in engine.shard.box(spec).sizes)] = 0.0
            largest = max(largest, float(padding.abs().max()))
    return largest


def begin_from(case: dict, engine: Engine, mesh: Mesh, out: Path) -> None:
    """Load a checkpoint, grown where the case says so, and save at once what was loaded."""
    folder, open_state = Path(case["load"]), CheckpointReader
    if "grow" in case:
        plan = plan_growth(RunConfig.from_dict(read_manifest(folder).config), read_request(case["grow"]))
        open_state = partial(GrownReader, plan=plan)
    manifest = load_checkpoint(folder, engine.state, mesh, open_state)
    grown_regions = manifest.optimizer.grown_regions
    install_bias_correction(engine.state, grown_regions)
    config = build(case["flags"])
    if config.optimizer.has_new_lr:
        install_new_lr(engine.state, newest_regions(config.model, manifest), config.optimizer)
    start = RunProgress(0, 0, 0, 0)
    save(engine, mesh, out / case["name"], SaveRequest(start, {}, "", grown_regions=grown_regions))


def save(engine: Engine, mesh: Mesh, folder: Path, request: SaveRequest) -> None:
    writer = CheckpointWriter(folder, engine.state, mesh)
    writer.begin(request, async_save=False)
    writer.finish()


@contextmanager
def compiled_in_turn(lock: Path) -> Iterator[None]:
    """Have one rank at a time compile: the others find in inductor's cache what the first has made."""

    def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            from torch._inductor.compile_fx import compile_fx  # seconds, and one case needs it

            return compile_fx(graph, inputs)

    with (
        mock.patch.object(stage_module, "compile_blocks", partial(decoder.compile_blocks, backend=inductor)),
        mock.patch.object(decoder, "compiled_kernel", partial(decoder.compiled_kernel, inductor)),
    ):
        yield


def run_case(case: dict, out: Path, index: int) -> None:
    config = build(case["flags"])
    world = read_world(os.environ)
    # A port of its own for each case: the last one's may not be free again yet.
    world = dataclasses.replace(world, master_port=world.master_port + index)
    check(config, world.size)
    parallel, training = config.parallel, config.training
    by_node = parallel.hierarchical_grad_reduce
    if by_node:
        world = dataclasses.replace(world, local_size=2)
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    mesh = make_mesh(world, tp_size, pp_size, TIMEOUT_S, by_node)
    beacon = Beacon()
    if config.optimizer.optimizer_impl == "deepspeed":
        build_deepspeed_adam(mesh)
    with compiled_in_turn(out / "compiler.lock"):
        engine = Engine(config, mesh, beacon=beacon)
    if "load" in case:
        begin_from(case, engine, mesh, out)
    batches = global_batches(config.model.vocab_size, training.global_batch_size, training.seq_length)
    positions = None
    if config.data.reset_attention_mask:
        positions = document_positions(training.global_batch_size, training.seq_length)
    mine = my_batches(batches, training.micro_batch_size, mesh, positions)
    requests = scoring_requests(
        config.model.vocab_size, training.seq_length, case.get("every_last_token", False)
    )
    losses, norms, padding, scores = [], [], 0.0, {}
    for step in range(1, STEPS + 1):
        result = engine.train_step(mine, config.optimizer.lr)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        padding = max(padding, padding_of(engine))
        if step in (2, STEPS):  # the law of the steps between says that training does not notice
            asked = requests if step == STEPS else requests[:4]
            scores = DistributedScorer(config, mesh, engine).run(evaluator_of(asked))
        if step in (1, STEPS):
            request = SaveRequest(RunProgress(step, 0, 0, 0), dataclasses.asdict(config), "")
            save(engine, mesh, out / case["name"], request)
    again = my_batches(batches[:1], training.micro_batch_size, mesh, positions)
    before, count = beacon.read()[0], config.accumulation_steps(world.size)
    evaluation = engine.evaluate(again, count)
    record = {
        "marks_per_micro_batch": (beacon.read()[0].marks - before.marks) / count,
        "losses": losses,
        "norms": norms,
        "evaluation": evaluation,
        "padding": padding,
        "scores": scores,
    }
    (out / case["name"] / f"rank_{mesh.rank}.json").write_text(json.dumps(record))
    close_mesh()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for index, case in enumerate(cases):
        call_in_fork(run_case, case, out, index)


if __name__ == "__main__":
    main()

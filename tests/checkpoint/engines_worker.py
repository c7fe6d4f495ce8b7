"""A toy model on real DeepSpeed engines, in real processes, for test_checkpoint_engines.py.

    python engines_worker.py FOLDER

imports torch and DeepSpeed once and forks the ranks of each start, which import nothing more.

Each tensor-parallel rank computes with its own shard and talks to no other: here only the state counts.
The gains' gradients do not depend on the shards, so that they stay equal on all ranks as they must.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor

import tests.support.preload  # noqa: F401 - what the ranks would import
from megatron_nexus.checkpoint import writer
from megatron_nexus.checkpoint.manifest import RunProgress
from megatron_nexus.checkpoint.resume import load_checkpoint
from megatron_nexus.checkpoint.run_dir import find_checkpoint
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.checkpoint.writer import CheckpointWriter, SaveRequest
from megatron_nexus.errors import CheckpointError
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.zero_state import (
    PRIVATE_NAMES,
    PRIVATE_PARAMETER_NAMES,
    ZeroState,
    zero_state,
)
from tests.checkpoint.engine_kinds import FOUR_RANKS, KILLED, STARTS, Kind, at_step
from tests.checkpoint.toy_model import INNER, WIDTH, D, Down, Layer, M, Toy, Up, loss_of
from tests.support.ports import free_port
from tests.support.warm_server import call_in_fork

MICRO_BATCH, ACCUMULATION = 4, 2
MOST_CASES = 30


def arrange(base: Mesh, kind: Kind) -> Mesh:
    """Another mesh of the same ranks, without leaving torch.distributed."""
    data_size = base.world_size // (kind.tensor_size * kind.pipe_size)
    rest, tensor = divmod(base.rank, kind.tensor_size)
    pipe, data = divmod(rest, data_size)
    return replace(
        base,
        pp_rank=pipe,
        pp_size=kind.pipe_size,
        dp_rank=data,
        dp_size=data_size,
        tp_rank=tensor,
        tp_size=kind.tensor_size,
    )


class Run:
    """One engine of a kind, and what to do with it."""

    def __init__(self, base: Mesh, kind: Kind) -> None:
        self.kind, self.mesh = kind, arrange(base, kind)
        mesh = self.mesh
        self.shard = Shard(mesh.tp_rank, mesh.tp_size)
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.pp_size, num_mp=mesh.tp_size, num_dp=mesh.dp_size
        )
        if kind.pipe_size > 1:
            layers = [LayerSpec(Up, self.shard), LayerSpec(Down, self.shard)]
            model = PipelineModule(layers, topology=topology, loss_fn=loss_of, partition_method="uniform")
            mpu = None
        else:
            model, mpu = Toy(self.shard), PipelineParallelGrid(topology=topology)
        named = [pair for layer in model.modules() if isinstance(layer, Layer) for pair in layer.named()]
        self.parameters = {spec.name: (spec, parameter) for spec, parameter in named}
        groups = [
            {"name": "decay", "weight_decay": 0.1, "params": [p for s, p in named if s.decays]},
            {"name": "no_decay", "weight_decay": 0.0, "params": [p for s, p in named if not s.decays]},
        ]
        config = {
            "train_batch_size": MICRO_BATCH * ACCUMULATION * mesh.dp_size,
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": kind.precision != "fp32"},
            "zero_optimization": {
                "stage": kind.zero_stage,
                "overlap_comm": False,
                "reduce_bucket_size": 1000,
                "stage3_param_persistence_threshold": 10,  # the gains persist, the matrices do not
            },
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
            "steps_per_print": 2**62,
        }
        if kind.precision != "bf16_accumulating_bf16":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        adam = torch.optim.AdamW(groups, lr=0.01, fused=True)
        self.chunks: set[str] = set()
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config, mpu=mpu)

    def train(self, first: int, stop: int) -> list[float]:
        """Take the steps [first, stop); the losses as this rank sees them."""
        losses = []
        for step in range(first, stop):
            if step == 2:
                for group in self.engine.optimizer.optimizer.param_groups:
                    group["lr"] = 0.003
            batches = [self._batch(step, micro) for micro in range(ACCUMULATION)]
            if self.kind.pipe_size > 1:
                losses.append(float(self.engine.train_batch(iter(batches))))
                continue
            for batch in batches:
                loss = self.engine(*batch)
                self.engine.backward(loss)
                self.engine.step()
                losses.append(float(loss.detach()))
        return losses

    def _batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        seed = (step * ACCUMULATION + micro) * 100 + self.mesh.dp_rank
        random = torch.Generator().manual_seed(seed)
        return torch.randn(MICRO_BATCH, D, generator=random), torch.randn(
            MICRO_BATCH, 2 * D, generator=random
        )

    def begin_save(self, root: Path, step: int, async_save: bool) -> CheckpointWriter:
        saving = CheckpointWriter(
            root, self.state(), self.mesh, on_chunk=lambda: self.chunks.update(["written"])
        )
        request = SaveRequest(
            RunProgress(step, samples=8 * step, tokens=64 * step, flops=10**18 * step),
            config={"kind": self.kind.name},
            tokenizer_fingerprint="none",
            lineage=[{"parent": None}],
        )
        saving.begin(request, async_save)
        return saving

    def state(self) -> ZeroState:
        return zero_state(self.engine, self.parameters, self.shard)

    def save(self, root: Path, step: int) -> Path:
        return self.begin_save(root, step, async_save=False).finish().folder

    def load(self, folder: Path) -> None:
        load_checkpoint(folder, self.state(), self.mesh, on_chunk=lambda: self.chunks.update(["read"]))

    def weights_off_master(self, folder: Path) -> list[str]:
        """The parameters that are not the cast of the master weights in a checkpoint, padded with zeros."""
        reader, off = CheckpointReader(folder), []
        for name, (spec, parameter) in self.parameters.items():
            box = self.shard.box(spec)
            expected = torch.zeros(self.shard.local_shape(spec))
            values = torch.from_numpy(reader.read_box(name, "fp32", box))
            expected[tuple(slice(0, size) for size in box.sizes)] = values
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.kind.zero_stage == 3):
                if not torch.equal(parameter.detach(), expected.to(parameter.dtype)):
                    off.append(name)
        return off


def resume_exactly(base: Mesh, kind: Kind, folder: Path) -> dict[str, object]:
    """Train 6 steps, saving at 0, 3 and 6; in a new engine go on from 3, save, then start again from 0.

    The save at 3 is asynchronous.
    """
    run = Run(base, kind)
    optimizer = run.engine.optimizer
    run.save(folder / "through", 0)
    first = run.train(0, 3)
    saving = run.begin_save(folder / "through", 3, async_save=True)
    random_before = torch.rand(2).tolist()
    through = run.train(3, 6)
    while saving.is_busy:
        saving.settle()
    run.save(folder / "through", 6)
    again = Run(base, kind)
    again.load(at_step(folder / "through", 3))
    random_after = torch.rand(2).tolist()
    counters = [again.engine.global_steps, again.engine.global_samples, again.engine.skipped_steps]
    off = again.weights_off_master(at_step(folder / "through", 3))
    resumed = again.train(3, 6)
    again.save(folder / "resumed", 6)
    again.load(at_step(folder / "through", 0))
    first_again = again.train(0, 3)
    missing = [name for name in PRIVATE_NAMES[type(optimizer)] if not hasattr(optimizer, name)]
    for _, parameter in run.parameters.values():
        missing += [n for n in PRIVATE_PARAMETER_NAMES[type(optimizer)] if not hasattr(parameter, n)]
    return {
        "optimizer": type(optimizer).__name__,
        "first": [first, first_again],
        "losses": [through, resumed],
        "random": [random_before, random_after],
        "counters": [counters, [3, 3 * MICRO_BATCH * ACCUMULATION * run.mesh.dp_size, 0]],
        "off_master": off,
        "missing_names": missing,
        "progress": sorted(again.chunks),
    }


def cross(base: Mesh, source: Path, here: Kind, there: Kind, folder: Path) -> list[str]:
    """Load what `here` wrote `there`, save, load that `here` again, save."""
    over = Run(base, there)
    over.load(source)
    written = over.save(folder / "there", 3)
    off = over.weights_off_master(source)
    over.train(3, 4)
    back = Run(base, here)
    back.load(written)
    back.save(folder / "back", 3)
    return off + back.weights_off_master(source)


def error_of(action: object, *arguments: object) -> str:
    try:
        action(*arguments)
    except CheckpointError as error:
        return str(error)
    return ""


def fail_cleanly(base: Mesh, folder: Path) -> dict[str, object]:
    """Errors on one rank, errors in what is asked; and a step that is saved twice."""
    run, root = Run(base, Kind(1)), folder / "failing"
    run.train(0, 1)
    run.save(root, 1)
    write_chunks = writer.write_chunks

    def full_disk(*arguments: object) -> None:
        write_chunks(*arguments)
        if base.rank == base.world_size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer.write_chunks = full_disk
    outcome: dict[str, object] = {"full_disk": error_of(run.save, root, 2)}

    def crash(*arguments: object) -> None:
        if base.rank == 0:
            raise MemoryError("no more")

    writer.write_chunks = crash
    saving = run.begin_save(root, 2, async_save=True)
    outcome["crash"] = error_of(lambda: [saving.settle() for _ in iter(lambda: saving.is_busy, False)])
    writer.write_chunks = write_chunks
    outcome["after_full_disk"] = sorted(path.name for path in root.iterdir())
    spec, parameter = run.parameters["up.weight"]
    right = run.parameters
    wider = replace(spec, axes=(replace(INNER, size=M + 2), WIDTH))
    run.parameters = {**right, "up.weight": (wider, parameter)}
    outcome["other_shape"] = error_of(run.load, at_step(root, 1))
    run.parameters = {name: pair for name, pair in right.items() if name != "up.gain"}
    outcome["fewer_parameters"] = error_of(run.load, at_step(root, 1))
    run.parameters = right
    outcome["file_in_the_way"] = error_of(run.save, at_step(root, 1) / "manifest.json" / "below", 2)
    run.train(1, 2)
    run.save(root, 1)
    outcome["after_replacing"] = sorted(path.name for path in root.iterdir())
    outcome["replaced_off_master"] = run.weights_off_master(at_step(root, 1))
    return outcome


def be_killed_while_saving(base: Mesh, folder: Path) -> None:
    """The last rank dies in the middle of its second save."""
    run = Run(base, KILLED)
    run.train(0, 1)
    run.save(folder / "killed", 1)
    write_chunks = writer.write_chunks

    def die(*arguments: object) -> None:
        write_chunks(*arguments)
        if base.rank == base.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    writer.write_chunks = die
    run.train(1, 2)
    run.save(folder / "killed", 2)


def take_up(base: Mesh, folder: Path) -> None:
    """Save what the ranks of the killed save left."""
    run = Run(base, FOUR_RANKS[0])
    run.load(find_checkpoint(folder))
    run.save(folder, 2)


def run_case(index: int, name: str, plan: Path, case: Callable[..., object], *arguments: object) -> None:
    """One case, at a port of its own, and its outcome."""
    # TRAPS of CPU runs: DeepSpeed's shared-memory collectives leak 67 MB a rank and need a compiler.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    world = read_world(os.environ)
    torch.manual_seed(world.rank)
    world = replace(world, master_port=world.master_port + index)
    base = make_mesh(world, tp_size=1, pp_size=1, timeout_s=300.0)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    outcome = case(base, *arguments)
    (plan / f"{name}_{base.rank}.json").write_text(json.dumps(outcome))
    close_mesh()


def run_rank(plan: Path, world_size: int) -> None:
    """All cases of a start, on one of its ranks."""
    kinds, crossings = STARTS[world_size]
    cases: list[tuple[object, ...]] = [
        (kind.name, plan, resume_exactly, kind, plan / kind.name) for kind in kinds
    ]
    for here, there in crossings:
        name = f"{here.name}-to-{there.name}"
        source = at_step(plan / here.name / "through", 3)
        cases.append((name, plan, cross, source, here, there, plan / name))
    if world_size == 2:
        cases += [("failures", plan, fail_cleanly, plan), ("killed", plan, be_killed_while_saving, plan)]
    else:
        cases.append(("continued", plan, take_up, plan.parent / "continued"))
    for index, case in enumerate(cases):
        call_in_fork(run_case, index, *case)


def start(name: str, world_size: int, folder: Path) -> list[int]:
    """Fork the ranks of a start and wait; their exit codes."""
    plan = folder / name
    plan.mkdir()
    # Nodes of two ranks: those of a node write one file.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port(MOST_CASES)), LOCAL_WORLD_SIZE="2")
    context, ranks = multiprocessing.get_context("fork"), []
    for rank in range(world_size):
        # read by the child, which gets a copy of this environment
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        ranks.append(context.Process(target=run_rank, args=(plan, world_size)))
        ranks[-1].start()
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    codes = {"two": start("two", 2, folder)}
    shutil.copytree(folder / "two" / "killed", folder / "continued")
    codes["four"] = start("four", 4, folder)
    (folder / "codes.json").write_text(json.dumps(codes))

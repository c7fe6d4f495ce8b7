"""One rank whose engine takes steps in bf16; records losses, norms and what Adam receives.

Usage: gradients_worker.py CASES.json OUT_FOLDER; the launcher's variables come from the environment.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_nexus.config.command_line import build
from megatron_nexus.config.rules import check
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models import decoder
from megatron_nexus.parallel.mesh import Mesh, close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training import stage_module
from megatron_nexus.training.engine import Engine
from tests.support.warm_server import call_in_fork

STEPS = 3


class HostReads(TorchDispatchMode):
    """Counts what has the host wait for a value of a tensor: item(), bool(), float()."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Reductions:
    """Sees what is sent to sum gradients: elements, and how often a backward pass was under way."""

    def __init__(self) -> None:
        self.sent = self.in_backward = self.after_backward = self.all_reduced = 0

    @contextmanager
    def seen(self) -> Iterator[None]:
        all_to_all, all_reduce = dist.all_to_all_single, dist.all_reduce

        def exchange(received: Tensor, flat: Tensor, **options: object) -> object:
            self.sent += flat.numel() - flat.numel() // dist.get_world_size(options["group"])
            running = torch._C._current_graph_task_id() != -1
            self.in_backward += running
            self.after_backward += not running
            return all_to_all(received, flat, **options)

        def reduce(tensor: Tensor, *arguments: object, **options: object) -> object:
            self.all_reduced += tensor.numel() * (tensor.numel() > 10_000)
            return all_reduce(tensor, *arguments, **options)

        with mock.patch.multiple(dist, all_to_all_single=exchange, all_reduce=reduce):
            yield


def micro_batches(
    samples: int, seq_length: int, vocab_size: int, mesh: Mesh
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of one sample; together the ranks read the same samples at every topology."""
    generator = torch.Generator().manual_seed(7)
    while True:
        ids = torch.randint(0, vocab_size, (samples, seq_length + 1), generator=generator)
        for index in range(mesh.dp_rank, samples, mesh.dp_size):
            sample = ids[index : index + 1]
            yield sample[:, :-1].contiguous(), sample[:, 1:].contiguous()


@contextmanager
def compiled_by(backend: str) -> Iterator[None]:
    """Have --compile use a backend of torch.compile; "force_eager": its code, but nothing compiled."""
    if backend == "force_eager":
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    with (
        mock.patch.object(stage_module, "compile_blocks", partial(decoder.compile_blocks, backend=backend)),
        mock.patch.object(decoder, "compiled_kernel", partial(decoder.compiled_kernel, backend)),
    ):
        yield


def run_case(flags: dict, index: int, out: Path) -> None:
    backend = flags.pop("backend", "inductor")
    counters["stats"].clear()
    with compiled_by(backend):
        record = take_steps(build(flags), index)
    record["graphs"] = counters["stats"]["unique_graphs"]
    (out / f"{index}-{os.environ['RANK']}.json").write_text(json.dumps(record))


def take_steps(config: RunConfig, index: int) -> dict[str, object]:
    world = read_world(os.environ)
    world = dataclasses.replace(world, master_port=world.master_port + index)
    check(config, world.size)
    parallel, training = config.parallel, config.training
    mesh = make_mesh(world, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    engine = Engine(config, mesh)
    received = {"elements": 0, "exact in bf16": 0}

    def look(adam: torch.optim.Optimizer, *_: object) -> None:
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            gradient = parameter.grad[parameter.grad != 0]  # tokens that no sample holds have none
            assert gradient.dtype == torch.float32
            received["elements"] += gradient.numel()
            received["exact in bf16"] += int((gradient.bfloat16().float() == gradient).sum())

    def spoil(*_: object) -> None:
        """What sums hold after a step is overwritten in the next, not added to."""
        for total in chain.from_iterable(getattr(engine.optimizer, "fp32_groups_gradients", ())):
            total.fill_(torch.nan)

    engine.deepspeed.basic_optimizer.register_step_post_hook(spoil)
    hook = engine.deepspeed.basic_optimizer.register_step_pre_hook(look)
    batches = micro_batches(training.global_batch_size, training.seq_length, config.model.vocab_size, mesh)
    waits = 0

    def wait(*_: object) -> None:
        nonlocal waits
        waits += 1

    with mock.patch.object(type(get_accelerator()), "synchronize", wait):  # a CPU has nothing to wait for
        results = [engine.train_step(batches, config.optimizer.lr) for _ in range(STEPS)]
        hook.remove()
        reads = HostReads()  # compiled code runs in no such mode
        with nullcontext() if config.training.compile else reads, (reductions := Reductions()).seen():
            asked = (mesh.rank == mesh.world_size - 1, False, mesh.rank == 0)
            flags = engine.train_step(batches, config.optimizer.lr, lambda: asked).flags
    close_mesh()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "waits": waits,
        "host reads": reads.count,
        "flags": flags,
        "parameters": sum(parameter.numel() for _, parameter in engine.parameters.values()),
        **vars(reductions),
        **received,
    }


def main() -> None:
    for index, flags in enumerate(json.loads(sys.argv[1])):
        call_in_fork(run_case, flags, index, Path(sys.argv[2]))


if __name__ == "__main__":
    main()

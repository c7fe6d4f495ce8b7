"""What the start of a run costs one rank, and the store that all ranks share, as a function of their number.

    python benchmarks/startup.py count --ranks 8 64 512 4096 16384 --out counted.json
    python benchmarks/startup.py run --ranks 8 16 32 64 --out ran.json
    python benchmarks/startup.py plot before.json after.json --out docs/startup.png

`count` is rank 0 alone, with a fake process group: it makes the mesh and the grid of DeepSpeed, and counts
calls and groups. Store operations and connections follow from the groups by what `run` has seen of gloo.
`run` starts real processes on this machine, forked from one that has imported everything, which make the mesh
and an engine of a tiny model and take two steps. Another version of the package is measured by PYTHONPATH.
"""

import argparse
import json
import math
import multiprocessing
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import deepspeed.ops
import torch
import torch._dynamo  # which torch imports at the first optimizer
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.parallel import mesh as mesh_module
from megatron_nexus.parallel.mesh import Mesh, make_mesh
from megatron_nexus.parallel.rendezvous import connect
from megatron_nexus.parallel.world import World, read_world
from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled
from megatron_nexus.training.engine import Engine

Row = dict[str, float]
NODE = 8
STORE_OPERATIONS_PER_S = 56_000
"""Of one TCPStore, measured on two cores."""
FLAGS = "--preset nexusformer-tiny --seq-length 32 --vocab-size 512 --micro-batch-size 1 --train-iters 2"


def _counted(name: str) -> Any:
    """Make a method of a store that is counted."""

    def call(self: "CountingStore", *arguments: Any) -> Any:
        self.operations[name] += 1
        return getattr(self.store, name)(*arguments)

    return call


class CountingStore(Store):
    """The store of the ranks, of which every operation is counted."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.operations: Counter[str] = Counter()

    set, get, add, append = map(_counted, ("set", "get", "add", "append"))
    wait, check, compare_set, multi_get = map(_counted, ("wait", "check", "compare_set", "multi_get"))
    set_timeout = _counted("set_timeout")


class SilentGroup:
    """A gloo group of the host tree whose other ranks say nothing."""

    def __init__(self, store: Store, rank: int, size: int, timeout: object) -> None:
        self.rank = lambda: rank
        self.size = lambda: size
        TREE.append(size)

    def _done(self, *arguments: object) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: None)

    reduce = broadcast = allgather = gather = _done


GROUPS: list[int] = []
TREE: list[int] = []
"""Sizes of the groups that rank 0 is in: of torch, and of the host tree."""


@contextmanager
def alone() -> Iterator[Counter[str]]:
    """Have rank 0 of a world start without the others; counts its calls."""
    calls: Counter[str] = Counter()
    GROUPS.clear()
    TREE.clear()
    init, new_group = dist.init_process_group, dist.new_group

    def fake_init(**arguments: Any) -> None:
        GROUPS.append(arguments["world_size"])
        init(**{**arguments, "backend": "fake", "store": FakeStore()})

    def counted(ranks: Sequence[int] | None = None, *more: Any, **named: Any) -> Any:
        calls["new_group"] += 1
        members = range(dist.get_world_size()) if ranks is None else ranks
        if dist.get_rank() in members:
            GROUPS.append(len(members))
        return new_group(ranks, **{**named, "backend": "fake"})

    def summed(x: torch.Tensor, *_: object, group: dist.ProcessGroup) -> None:
        x.fill_(group.size())

    patches: list[AbstractContextManager[object]] = [
        mock.patch.object(mesh_module, "connect", lambda *_: HashStore()),
        mock.patch.object(dist, "init_process_group", fake_init),
        mock.patch.object(dist, "new_group", counted),
        mock.patch.object(dist, "all_reduce", summed),
    ]
    if HAS_TREE:
        patches.append(mock.patch("megatron_nexus.parallel.host_tree.ProcessGroupGloo", SilentGroup))
    with ExitStack() as held:
        for patch in patches:
            held.enter_context(patch)
        yield calls
    dist.destroy_process_group()


HAS_TREE = Path(mesh_module.__file__).with_name("host_tree.py").exists()


def make_grid(mesh: Mesh) -> None:
    """What DeepSpeed is given as `mpu`."""
    if HAS_TREE:
        from megatron_nexus.parallel.grid import Grid

        Grid(mesh)
        return
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it is compiled, and leaves files
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    sizes = {"num_pp": mesh.pp_size, "num_mp": mesh.tp_size, "num_dp": mesh.dp_size}
    PipelineParallelGrid(topology=PipeModelDataParallelTopology(**sizes))


def count(ranks: int, tp_size: int, pp_size: int) -> Row:
    """Count what rank 0 does; it is in most groups."""
    world = World("torchrun", 0, ranks, 0, min(ranks, NODE), "127.0.0.1", 0)
    with alone() as calls:
        began = time.process_time()
        make_grid(make_mesh(world, tp_size, pp_size))
        seconds = time.process_time() - began
    peers = sum(map(_connected, GROUPS)) + sum(TREE) - len(TREE)
    return {
        "ranks": ranks,
        "new_group calls": calls["new_group"],
        "groups": len(GROUPS) + len(TREE),
        "CPU s": seconds,
        "connections": peers,
        "store operations": len(GROUPS) + len(TREE) + 2 * peers,
        "store s, all ranks": store_operations(ranks) / STORE_OPERATIONS_PER_S,
    }


def _connected(size: int) -> int:
    """Return with how many ranks of a group gloo connects: all; lazily two of a ring, log2 of a broadcast."""
    return min(size - 1, 2 + math.ceil(math.log2(size))) if HAS_TREE else size


def store_operations(ranks: int) -> int:
    """Operations of all ranks: gloo sets its address in a group, and asks twice for each that it needs."""
    if not HAS_TREE:
        return ranks * (len(GROUPS) + 2 * sum(GROUPS))
    from megatron_nexus.parallel.host_tree import levels

    # Most ranks are in a ring and a leaf of a broadcast, and send what they gather to one.
    total = sum(ranks * (1 + 2 * min(size - 1, 3)) for size in GROUPS)
    for rank in range(ranks):
        for members in levels(rank, ranks, min(ranks, NODE)):
            total += 1 + 2 * (len(members) - 1 if rank == members[0] else min(len(members) - 1, 3))
    return total


def sockets() -> int:
    """Count the open sockets of this process."""
    links = list(Path("/proc/self/fd").iterdir())
    return sum(str(link.readlink()).startswith("socket") for link in links if link.is_symlink())


def be_rank(rank: int, ranks: int, port: int, sizes: tuple[int, int], results: Connection) -> None:
    """Start, take two steps, and send what that has cost."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(NODE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tp_size, pp_size = sizes
    batch = 2 * ranks // (tp_size * pp_size)
    flags = f"{FLAGS} --tp {tp_size} --pp {pp_size} --global-batch-size {batch}".split()
    config = build(given_flags(flags))
    stores, before = [], sockets()

    def counting(*arguments: Any) -> CountingStore:
        stores.append(CountingStore(connect(*arguments)))
        return stores[0]

    with mock.patch.object(mesh_module, "connect", counting):
        mesh = make_mesh(read_world(os.environ), tp_size, pp_size, timeout_s=300.0)
    engine = Engine(config, mesh)
    start = {"sockets at start": sockets() - before, "store operations": stores[0].operations.total()}
    cpu_s = time.process_time()
    ones = torch.ones(1, 32, dtype=torch.long)
    for _ in range(2):
        engine.train_step(iter([(ones, ones)] * 2), 1e-3)
    ended = {"CPU s of the start": cpu_s, "sockets after two steps": sockets() - before}
    results.send({**start, **ended})
    results.recv()  # until all ranks are done
    os._exit(0)


def run(ranks: int, tp_size: int, pp_size: int) -> Row:
    """Start real ranks; the mean of what they say, and the most sockets of one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    import_muon_uncompiled()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(ranks)]
    began = time.monotonic()
    processes = [
        context.Process(target=be_rank, args=(rank, ranks, port, (tp_size, pp_size), pipe))
        for rank, (_, pipe) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        rows = []
        for ours, _ in pipes:
            assert ours.poll(600), "a rank has not answered"
            rows.append(ours.recv())
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.join()
    means = {name: sum(row[name] for row in rows) / ranks for name in rows[0]}
    most = max(row["sockets at start"] for row in rows)
    return {"ranks": ranks, **means, "most sockets at start": most, "wall s": seconds}


def plot(before: Path, after: Path, out: Path) -> None:
    """Draw connections, store seconds and Python seconds of a start against the ranks."""
    import matplotlib.pyplot as plt

    old, new = (json.loads(path.read_text())["rows"] for path in (before, after))
    shown = {
        "connections": "connections of rank 0",
        "store s, all ranks": "seconds of the store, all ranks",
        "CPU s": "seconds of Python on rank 0",
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 3.6), layout="constrained")
    for ax, (name, label) in zip(axes, shown.items(), strict=True):
        for rows, label in ((old, "before"), (new, "now")):
            ax.loglog([row["ranks"] for row in rows], [row[name] for row in rows], "o-", label=label, base=10)
        ax.set(xlabel="ranks", title=label)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("count", "run", "plot"))
    parser.add_argument("files", type=Path, nargs="*", help="of plot: before and after")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.what == "plot":
        before, after = asked.files
        plot(before, after, asked.out)
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    measure = count if asked.what == "count" else run
    rows = []
    for ranks in asked.ranks:
        rows.append(measure(ranks, asked.tp, asked.pp))
        print(json.dumps({name: round(value, 3) for name, value in rows[-1].items()}), flush=True)
        asked.out.write_text(json.dumps({"tp": asked.tp, "pp": asked.pp, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

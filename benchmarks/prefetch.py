"""Step time where data are read slowly: in the step, and ahead of it by a thread.

    PYTHONPATH=. python benchmarks/prefetch.py --read-ms 0 50 200

One engine takes its steps in turn with batches of both kinds, each of which takes `--read-ms` to read, as
from a slow disk. Of the steps of a turn the first does not count: its batches were read while others
trained. The table has medians of the ratios within a round.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator

import torch

from megatron_nexus import log
from megatron_nexus.config.command_line import build
from megatron_nexus.data.prefetcher import Prefetcher
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.world import read_world
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.machine import tune_malloc
from megatron_nexus.training.rank_batches import Batch
from megatron_nexus.training.step_times import PhaseClock

MICRO_BATCHES, STEPS = 4, 3


def slow_batches(read_s: float, shape: tuple[int, int], vocab_size: int) -> Iterator[Batch]:
    """Random micro-batches, each of which takes `read_s` to read."""
    while True:
        time.sleep(read_s)
        ids = torch.randint(0, vocab_size, (shape[0], shape[1] + 1))
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Way:
    """One way to read, its batches and its times."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.clock = PhaseClock("cpu")
        self.turn_s: list[float] = []

    def take_turn(self, engine: Engine, beacon: Beacon) -> None:
        """Take a step that does not count, and STEPS that do."""
        beacon.observer = None
        engine.train_step(self.batches, 1e-4)
        beacon.observer = self.clock.mark
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.train_step(self.batches, 1e-4)
        self.turn_s.append(time.perf_counter() - began)
        beacon.mark(Phase.HOOKS)
        self.clock.collect()

    @property
    def data_share(self) -> float:
        """Share of the time in which the step waited for data."""
        return self.clock.seconds[Phase.DATA] / sum(self.turn_s)


def main() -> None:
    """Measure each reading time of the command line."""
    parser = argparse.ArgumentParser(description="Step time with a slow reader, without and with a thread.")
    parser.add_argument("--read-ms", type=float, nargs="+", default=[0.0, 50.0, 200.0])
    parser.add_argument("--preset", default="nexusformer-tiny")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    log.configure(is_main_rank=True)
    config = build({"preset": options.preset, "micro_batch_size": 4, "global_batch_size": 4 * MICRO_BATCHES})
    os.environ["LOCAL_RANK"] = "0"
    mesh = make_mesh(read_world(os.environ), 1, 1)
    tune_malloc()
    beacon = Beacon()
    engine = Engine(config, mesh, beacon=beacon)
    shape = config.training.micro_batch_size, config.training.seq_length
    print(
        "| read, ms a micro-batch | data, share of a step: in the step | ahead | step ahead / in the step |"
    )
    print("|---:|---:|---:|---:|")
    for read_ms in options.read_ms:
        slow = [slow_batches(read_ms / 1e3, shape, config.model.vocab_size) for _ in range(2)]
        with Prefetcher(slow[1]) as ahead:
            ways = Way(slow[0]), Way(ahead)
            for turn in range(options.rounds):
                for way in ways if turn % 2 else ways[::-1]:
                    way.take_turn(engine, beacon)
        first, second = (way.turn_s for way in ways)
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
        print(
            f"| {read_ms:g} | {ways[0].data_share:.1%} | {ways[1].data_share:.1%} | {ratio:.2f} |", flush=True
        )
    close_mesh()


if __name__ == "__main__":
    main()

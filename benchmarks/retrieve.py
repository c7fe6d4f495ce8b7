"""What a search costs in addition to its backward passes: sketching, scanning kept sketches, and memory.

    python pretrain_nexus.py --preset nexusformer-20m --train-iters 1 --save runs/bench
    python benchmarks/retrieve.py --load runs/bench

Three ratios, of CPU seconds of one process, each within a round and its median over the rounds:

- sketching: a sample's forward and backward with the sketch over the same without, for two lengths;
- scan: bytes a second of the cosines of kept sketches with one query, or the mean of several, and with 5
  (`--combine rank`), over those of a sum of the same memory;
- memory: the peak of a process in its first backward, above the loaded model: with the sketch, which frees
  each gradient as soon as it is there, and without.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch

from megatron_nexus import log
from megatron_nexus.analysis.sample_gradients import SampleGradients
from megatron_nexus.analysis.sketch_search import cosines
from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.data.answers import AnswerTokens

LENGTHS = (128, 512)
QUERIES = (1, 5)


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def peak_bytes(given: argparse.Namespace, kind: str, length: int) -> int:
    """Bytes above those of the loaded model that a process of its own holds at most in a backward."""
    command = [sys.executable, __file__, "--load", given.load, "--sketch-size", str(given.sketch_size)]
    done = subprocess.run(
        [*command, "--peak-of", kind, str(length)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def peak_above(work: Callable[[], object]) -> int:
    """Bytes that this process holds at most while `work` runs, above those before it."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line)
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    work()
    return status("VmHWM") - before


class Bench:
    """The model with sketches, and the same without."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.saved = open_saved_run(location(given.load))
        reader, config = CheckpointReader(self.saved.checkpoint), self.saved.config
        self.model = SampleGradients(reader, config, None, torch.float32, given.sketch_size, 1)
        self.hooks = {p: dict(p._post_accumulate_grad_hooks) for p in self.model.stage.parameters()}
        self.elements = sum(parameter.numel() for parameter in self.hooks)

    def sample(self, length: int) -> AnswerTokens:
        vocabulary = self.saved.config.model.vocab_size
        return AnswerTokens(
            tuple(np.random.default_rng(length).integers(0, vocabulary, length + 1).tolist()), 1
        )

    def sketch(self, length: int) -> None:
        for parameter, hooks in self.hooks.items():
            parameter._post_accumulate_grad_hooks.update(hooks)
        self.model.sketch([self.sample(length)])

    def plain(self, length: int) -> None:
        for parameter in self.hooks:
            parameter._post_accumulate_grad_hooks.clear()
        self.model.backward(self.sample(length))
        self.model.stage.zero_grad(set_to_none=True)


def measure_sketching(given: argparse.Namespace) -> None:
    bench = Bench(given)
    preset, elements = bench.saved.config.preset, bench.elements
    log.logger.info("%s: %s parameters, K %s", preset, f"{elements:,}", f"{given.sketch_size:,}")
    for length in LENGTHS:
        with_sketch, without = partial(bench.sketch, length), partial(bench.plain, length)
        without()
        with_sketch()
        rounds = [(seconds_of(with_sketch), seconds_of(without)) for _ in range(given.rounds)]
        ratio = statistics.median(one / other for one, other in rounds)
        own = statistics.median(one - other for one, other in rounds)
        log.logger.info(
            "sketching, %d tokens: %.3f of a forward and backward (%.2f ns an element)",
            length,
            ratio,
            1e9 * own / elements,
        )
        plain, sketch = (peak_bytes(given, kind, length) for kind in ("plain", "sketch"))
        log.logger.info(
            "memory, %d tokens: peak %.0f MB above the loaded model with sketches, %.0f MB without; weights "
            "and codes are %.0f MB each",
            length,
            sketch / 1e6,
            plain / 1e6,
            4e-6 * elements,
        )


def measure_scan(given: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    queries = torch.nn.functional.normalize(torch.randn(max(QUERIES), given.sketch_size), dim=1)
    shape = (given.sketches, given.sketch_size)
    with tempfile.NamedTemporaryFile(suffix=".f16") as file:
        rows = np.memmap(file.name, np.float16, "w+", shape=shape)
        some = rng.standard_normal((1024, given.sketch_size)).astype(np.float16)
        for first in range(0, len(rows), len(some)):
            rows[first : first + len(some)] = some[: len(rows) - first]
        words = torch.from_numpy(rows).view(torch.int64)
        log.logger.info("scan: %s sketches, %.2f GB", f"{given.sketches:,}", rows.nbytes / 1e9)
        for count in QUERIES:
            work = partial(cosines, rows, queries[:count])
            work()
            rounds = [(seconds_of(words.sum), seconds_of(work)) for _ in range(given.rounds)]
            log.logger.info(
                "scan, %d quer%s: %.2f of the memory bandwidth of a sum (%.1f GB/s)",
                count,
                "y" if count == 1 else "ies",
                statistics.median(whole / scan for whole, scan in rounds),
                statistics.median(rows.nbytes / scan for _, scan in rounds) / 1e9,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--load", required=True)
    parser.add_argument("--sketch-size", type=int, default=8192)
    parser.add_argument("--sketches", type=int, default=32_768, help="16 GB at a million")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak_of:
        bench, kind, length = Bench(given), given.peak_of[0], int(given.peak_of[1])
        sys.stdout.write(str(peak_above(partial(getattr(bench, kind), length))))
        return
    log.configure(is_main_rank=True)
    torch.set_num_threads(1)
    measure_sketching(given)
    measure_scan(given)


if __name__ == "__main__":
    main()

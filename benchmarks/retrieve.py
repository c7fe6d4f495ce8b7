"""What a search costs beside its backward passes: sketching, scanning kept sketches, and memory.

    python pretrain_nexus.py --preset nexusformer-20m --train-iters 1 --save runs/bench
    python benchmarks/retrieve.py --load runs/bench

Three ratios, of CPU seconds of one process, each within a round and its median over the rounds:

- sketching: a sample's forward and backward with the sketch over the same without, for two lengths;
- scan: bytes a second of the cosines of kept sketches with 5 queries, over those of a sum of the same memory;
- memory: the peak of a backward with the sketch, which frees each gradient, over that without, above what is
  held between two samples.
"""

import argparse
import os
import resource
import statistics
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
QUERIES = 5


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def peak_above(work: Callable[[], object]) -> int:
    """Bytes that the process holds at most while `work` runs, above those before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def status(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line)
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def measure_sketching(given: argparse.Namespace) -> None:
    saved = open_saved_run(location(given.load))
    reader = CheckpointReader(saved.checkpoint)

    def load() -> SampleGradients:
        return SampleGradients(reader, saved.config, None, torch.float32, given.sketch_size, 1)

    sketching, plain = load(), load()
    for parameter in plain.stage.parameters():
        parameter._post_accumulate_grad_hooks.clear()
    elements = sum(parameter.numel() for parameter in plain.stage.parameters())
    log.logger.info("%s: %s parameters, K %s", saved.config.preset, f"{elements:,}", f"{given.sketch_size:,}")
    rng = np.random.default_rng(0)

    def without(sample: AnswerTokens) -> None:
        plain.backward(sample)
        plain.stage.zero_grad(set_to_none=True)

    for length in LENGTHS:
        ids = rng.integers(0, saved.config.model.vocab_size, length + 1).tolist()
        sample = AnswerTokens(tuple(ids), 1)
        with_sketch, without_one = partial(sketching.sketch, [sample]), partial(without, sample)
        without_one()
        with_sketch()
        rounds = [(seconds_of(with_sketch), seconds_of(without_one)) for _ in range(given.rounds)]
        ratio = statistics.median(one / other for one, other in rounds)
        own = statistics.median(one - other for one, other in rounds)
        log.logger.info(
            "sketching, %d tokens: %.3f of a forward and backward (%.2f ns an element)",
            length,
            ratio,
            1e9 * own / elements,
        )
        peaks = [peak_above(with_sketch), peak_above(without_one)]
        log.logger.info(
            "memory, %d tokens: peak %.0f MB with sketches, %.0f MB without (%.2f); codes %.0f MB",
            length,
            *(peak / 1e6 for peak in peaks),
            peaks[0] / max(peaks[1], 1),
            4e-6 * elements,
        )


def measure_scan(given: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    queries = torch.nn.functional.normalize(torch.randn(QUERIES, given.sketch_size), dim=1)
    shape = (given.sketches, given.sketch_size)
    with tempfile.NamedTemporaryFile(suffix=".f16") as file:
        rows = np.memmap(file.name, np.float16, "w+", shape=shape)
        some = rng.standard_normal((1024, given.sketch_size)).astype(np.float16)
        for first in range(0, len(rows), len(some)):
            rows[first : first + len(some)] = some[: len(rows) - first]
        words = torch.from_numpy(rows).view(torch.int64)
        rounds = [
            (seconds_of(lambda: words.sum()), seconds_of(lambda: cosines(rows, queries)))
            for _ in range(given.rounds)
        ]
    share = statistics.median(whole / scan for whole, scan in rounds)
    speed = statistics.median(rows.nbytes / scan for _, scan in rounds)
    log.logger.info(
        "scan: %s sketches of %s, %.2f GB, %.2f of the memory bandwidth of a sum (%.1f GB/s)",
        *(f"{number:,}" for number in shape),
        rows.nbytes / 1e9,
        share,
        speed / 1e9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--load", required=True)
    parser.add_argument("--sketch-size", type=int, default=8192)
    parser.add_argument("--sketches", type=int, default=32_768, help="16 GB at a million")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    log.configure(is_main_rank=True)
    torch.set_num_threads(1)
    measure_sketching(given)
    measure_scan(given)
    log.logger.info("peak of the process: %.0f MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


if __name__ == "__main__":
    main()

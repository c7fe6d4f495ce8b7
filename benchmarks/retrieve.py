"""What a search costs in addition to its backward passes: sketching, scanning kept sketches, and memory.

    python pretrain_nexus.py --preset nexusformer-20m --train-iters 1 --save runs/bench
    python benchmarks/retrieve.py --load runs/bench
    python benchmarks/retrieve.py --sketches 1000000 --sketch-size 1024 [--from-disk]

Three ratios, of CPU seconds of one process, each within a round and its median over the rounds:

- sketching: a sample's forward and backward with the sketch over the same without, for two lengths;
- scan: bytes a second of the cosines of kept sketches with one query, or the mean of several, and with 5
  (`--combine rank`), over those of sums of the same files, and of memory without files;
- memory: the peak of a process in its first backward, above the loaded model: with the sketch, which frees
  each gradient as soon as it is there, and without.
"""

import argparse
import ctypes
import os
import resource
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
from megatron_nexus.analysis.sketch_store import SHARD_SAMPLES, SketchRecord, SketchStore
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


def write_store(folder: Path, samples: int, numbers: int) -> SketchStore:
    """Write a corpus's sketches as a search keeps them."""
    record = SketchRecord("", "", samples, numbers, 1, "whole", "none", "fp32")
    store = SketchStore(folder, record, numbers)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((len(store.rows(0)), numbers), np.float32)
    for first in store.missing():
        store.write(first, np.roll(rows, first // len(rows), axis=1)[: len(store.rows(first))])
    return store


def drop_from_memory(folder: Path) -> None:
    """Have the kernel forget the files of a folder."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of the CPU."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def measure_scan(given: argparse.Namespace) -> None:
    """Scan sketches on disk, as `score_corpus` does, next to a sum over the same mappings.

    A sum of float32 in RAM says what the memory gives without files.
    """
    queries = torch.nn.functional.normalize(torch.randn(max(QUERIES), given.sketch_size), dim=1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        store = write_store(folder, given.sketches, given.sketch_size)
        firsts = range(0, given.sketches, SHARD_SAMPLES)
        size = 4 * given.sketches * given.sketch_size
        in_memory = torch.ones(min(given.sketches, (1 << 28) // given.sketch_size), given.sketch_size)

        def stream() -> None:
            for first in firsts:
                torch.from_numpy(store.read(first)).sum()

        def scan(count: int) -> None:
            for first in firsts:
                cosines(store.read(first), queries[:count])

        log.logger.info(
            "scan: %s sketches of K %s, %.2f GB in files, %d thread(s); GB/s on the clock, of the CPU",
            *(f"{given.sketches:,}", f"{given.sketch_size:,}", size / 1e9, torch.get_num_threads()),
        )
        works: dict[str, tuple[Callable[[], object], int]] = {
            "sum in RAM": (in_memory.sum, 4 * in_memory.numel()),
            "sum of the files": (stream, size),
            "scan in RAM": (partial(cosines, in_memory.numpy(), queries[:1]), 4 * in_memory.numel()),
            **{
                f"scan, {count} quer{'y' if count == 1 else 'ies'}": (partial(scan, count), size)
                for count in QUERIES
            },
        }
        if given.from_disk:
            works = {name: works[name] for name in ("sum of the files", "scan, 1 query")}
        rounds: list[dict[str, tuple[float, float]]] = []
        for number in range(given.rounds + (not given.from_disk)):
            found = {}
            for name, (work, of) in works.items():
                if given.from_disk:
                    drop_from_memory(folder)
                wall, cpu = timed(work)
                found[name] = (of / wall / 1e9, of / cpu / 1e9)
            if number or given.from_disk:  # the first fills caches
                rounds.append(found)
        bases = list(works)[:2]
        for name in works:
            wall, cpu = (statistics.median(found[name][k] for found in rounds) for k in (0, 1))
            ratios = [
                statistics.median(found[name][1] / found[base][1] for found in rounds) for base in bases
            ]
            log.logger.info(
                "%-18s %6.2f %6.2f; of %s: %.2f, of %s: %.2f (CPU seconds)",
                *(name, wall, cpu, bases[0], ratios[0], bases[1], ratios[1]),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--load", help="a run; without, the scan alone is measured")
    parser.add_argument("--sketch-size", type=int, default=8192)
    parser.add_argument("--sketches", type=int, default=131_072, help="4 x K bytes each")
    parser.add_argument("--folder", help="where they are written")
    parser.add_argument("--from-disk", action="store_true", help="forget the files before each scan")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak_of:
        bench, kind, length = Bench(given), given.peak_of[0], int(given.peak_of[1])
        sys.stdout.write(str(peak_above(partial(getattr(bench, kind), length))))
        return
    log.configure(is_main_rank=True)
    torch.set_num_threads(given.threads)
    if given.load:
        measure_sketching(given)
    measure_scan(given)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log.logger.info("peak resident memory, mapped files included: %.2f GB", peak * 1024 / 1e9)


if __name__ == "__main__":
    main()

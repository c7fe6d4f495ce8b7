"""Training throughput of `nexus train`, of a bare loop of the same model and of other implementations.

    python benchmarks/train_step.py --threads 1 2 --precision fp32 bf16

Each contestant is a process of its own (an allocator belongs to a process), kept alive and asked for a few
steps at a time, in turn with all others idle. A round asks everybody once, so that whatever the machine does
meanwhile happens to all; ratios are taken within a round and their median is reported. The first step, with
compilation where there is one, is a column of its own. docs/performance.md has the results.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from contestants import Job, serve

from megatron_nexus.config.command_line import build
from megatron_nexus.config.run_config import Precision
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter, token_dtype

DOCUMENTS, TOKENS_PER_DOCUMENT = 1000, 2052
COUNT_TOLERANCE = 0.02
START_TIMEOUT_S = 900.0  # two compilations at the same time on two cores


@dataclass(frozen=True)
class Entry:
    """A row of the table: what it is called, its builder, and how its process is set up."""

    name: str
    kind: str
    tunes_malloc: bool
    compiled: bool = False
    fused: bool = True
    precision: Precision | None = None  # where it is not the table's


REAL_PATH = Entry("megatron_nexus", "real_path", True)
REAL_PATH_COMPILED = Entry("megatron_nexus, --compile", "real_path", True, compiled=True)
REAL_PATH_FP32 = Entry("megatron_nexus, fp32", "real_path", True, precision="fp32")
SAME_COMPILED = Entry(
    "megatron_nexus, litgpt's architecture, --compile", "same_architecture", True, compiled=True
)
LITGPT_COMPILED = Entry("litgpt, torch.compile", "litgpt", True, compiled=True)
GEMM = Entry("matrix products", "gemm", True)
BARE = Entry("bare loop of its model", "bare", True)
PEERS = (
    Entry("Qwen3, transformers", "qwen3", True),
    Entry("litgpt", "litgpt", True),
    Entry("GPT-2's shape", "small_gpt", True),
)
AS_USED = (
    Entry("bare loop of its model", "bare", False),
    Entry("Qwen3, transformers.Trainer", "qwen3_trainer", False),
    # Both ask for the fused AdamW on CUDA alone: litgpt's pretrain.py, nanoGPT's configure_optimizers.
    Entry("litgpt", "litgpt", False, fused=False),
    Entry("GPT-2's shape", "small_gpt", False, fused=False),
)
COMPILED = (
    REAL_PATH_COMPILED,
    SAME_COMPILED,
    LITGPT_COMPILED,
    Entry("litgpt, torch.compile", "litgpt", False, compiled=True, fused=False),
)


class Contestant:
    """A running process and what it has answered."""

    def __init__(self, entry: Entry, job: Job, cpu_seconds: bool) -> None:
        self.entry = entry
        self._clock = int(cpu_seconds)
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=serve, args=(job, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._log = job.folder / f"{job.kind}.log"
        self.facts: dict[str, float] = {}
        self.seconds: list[float] = []

    def await_warm(self) -> None:
        """Wait until the process has built its model and taken its first step."""
        if not self._connection.poll(START_TIMEOUT_S):
            raise SystemExit(f"{self.entry.name} does not start: {self._log.read_text()}")
        self.facts = self._receive()

    def ask(self, steps: int) -> float:
        """Seconds that the next `steps` steps took."""
        self._connection.send(steps)
        return float(self._receive()[self._clock])

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise SystemExit(f"{self.entry.name} failed:\n{self._log.read_text()}") from None

    def close(self) -> None:
        """End the process: its own way out would save, summarise and join threads."""
        self._process.kill()
        self._process.join()


@dataclass(frozen=True)
class Result:
    """A row: rates per round, in the order of the rounds."""

    name: str
    tunes_malloc: bool
    fused: bool
    parameters: int
    flops_per_token: float
    tokens_per_s: list[float]
    warm_up_s: float
    gemm_share: float
    nexus_train_ratio: float
    compiled_ratio: float | None
    """Of `nexus train --compile`, where it has run."""

    @property
    def median(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.tokens_per_s)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of two rates within each round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def compete(
    entries: list[Entry], threads: int, precision: Precision, rounds: int, steps: int, cpu_seconds: bool
) -> list[Result]:
    """Run one table: start everybody, then round after round ask each for `steps` steps."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the processes that start now
    with tempfile.TemporaryDirectory(prefix="train_step-") as folder:
        corpus = Path(folder) / "random"
        write_corpus(corpus)
        contestants = []
        for index, entry in enumerate([GEMM, *entries]):
            own = Path(folder) / str(index)
            own.mkdir()
            job = Job(
                entry.kind,
                entry.precision or precision,
                entry.tunes_malloc,
                entry.compiled,
                entry.fused,
                corpus,
                own,
            )
            contestants.append(Contestant(entry, job, cpu_seconds))
        try:
            for contestant in contestants:
                contestant.await_warm()
            for contestant in contestants:
                contestant.ask(1)  # alone for the first time
            for turn in range(rounds):
                first = turn % len(contestants)
                for contestant in contestants[first:] + contestants[:first]:
                    contestant.seconds.append(contestant.ask(steps) / steps)
        finally:
            for contestant in contestants:
                contestant.close()
    return evaluate(contestants[0], contestants[1:])


def evaluate(gemm: Contestant, contestants: list[Contestant]) -> list[Result]:
    """Rates and ratios of one table. Refuses contestants of different sizes."""
    real = next(contestant for contestant in contestants if contestant.entry == REAL_PATH)
    compiled = next((c for c in contestants if c.entry == REAL_PATH_COMPILED), None)
    gemm_rates = [gemm.facts["flops_per_step"] / seconds for seconds in gemm.seconds]
    results = []
    for contestant in contestants:
        made = contestant.facts
        assert abs(made["parameters"] / real.facts["parameters"] - 1) <= COUNT_TOLERANCE, (
            f"{contestant.entry.name}: {made['parameters']:,} parameters, not {real.facts['parameters']:,}"
        )
        flops = [made["flops_per_step"] / seconds for seconds in contestant.seconds]
        results.append(
            Result(
                name=contestant.entry.name,
                fused=contestant.entry.fused,
                tunes_malloc=contestant.entry.tunes_malloc,
                parameters=int(made["parameters"]),
                flops_per_token=made["flops_per_token"],
                tokens_per_s=[made["tokens_per_step"] / seconds for seconds in contestant.seconds],
                gemm_share=ratio(flops, gemm_rates),
                warm_up_s=made["warm_up_s"],
                nexus_train_ratio=ratio(contestant.seconds, real.seconds),
                compiled_ratio=ratio(contestant.seconds, compiled.seconds) if compiled else None,
            )
        )
    return results


def write_corpus(prefix: Path) -> None:
    """Random tokens in the file format that `nexus train` reads."""
    vocabulary = build({"preset": "nexusformer-20m"}).model.vocab_size
    generator = np.random.default_rng(1234)
    with IndexedDatasetWriter(prefix, token_dtype(vocabulary)) as writer:
        for _ in range(DOCUMENTS):
            writer.add_document(generator.integers(0, vocabulary, TOKENS_PER_DOCUMENT))


def report(results: list[Result], threads: int, precision: Precision) -> None:
    """Print one table and the comparisons that matter."""
    print(f"\n{threads} thread{'s' if threads > 1 else ''}, {precision}\n")
    names = ("contestant", "allocator", "AdamW", "parameters", "MFLOP/token", "first step", "tokens/s")
    print(f"| {' | '.join(names)} | of GEMM rate | nexus train / it | nexus train --compile / it |")
    print(f"|{3 * '---|'}{7 * '---:|'}")
    for result in results:
        print(
            f"| {result.name} | {'mallopt' if result.tunes_malloc else 'default'} "
            f"| {'fused' if result.fused else 'default'} "
            f"| {result.parameters / 1e6:.2f}M | {result.flops_per_token / 1e6:.0f} "
            f"| {result.warm_up_s:.0f} s | {result.median:,.0f} "
            f"| {100 * result.gemm_share:.0f} % | {result.nexus_train_ratio:.2f} "
            f"| {'' if result.compiled_ratio is None else f'{result.compiled_ratio:.2f}'} |"
        )
    peers = {entry.name for entry in PEERS}
    rivals = [result for result in results if result.tunes_malloc and result.name in peers]
    if rivals:
        fastest = max(rivals, key=lambda result: result.median)
        print(
            f"\nfastest peer under the same allocator: {fastest.name}, ratio {fastest.nexus_train_ratio:.2f}"
        )


def main() -> None:
    """Run all tables of the command line."""
    parser = argparse.ArgumentParser(description="Training throughput compared with a bare loop and peers.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of each contestant")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each contestant runs once a round")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps a round")
    parser.add_argument("--only", nargs="+", help="builders to run next to nexus train, such as bare litgpt")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="add nexus train --compile, and litgpt under torch.compile as its command runs it",
    )
    parser.add_argument(
        "--same-allocator",
        action="store_true",
        help="leave out the rows with glibc's default malloc settings",
    )
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="measure CPU time instead of wall time, on a machine that is shared; best with --threads 1",
    )
    parser.add_argument("--json", type=Path, help="file to write all numbers to, as JSON")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(
        f"load average before the start: {load:.2f} (above 0.5 other processes are computing: repeat later)"
    )
    tables = []
    for threads in options.threads:
        for precision in options.precision:
            entries = [BARE, *PEERS, *AS_USED, *(COMPILED if options.compile else ())]
            if options.only:
                entries = [entry for entry in entries if entry.kind in ("real_path", *options.only)]
            if options.same_allocator:
                entries = [entry for entry in entries if entry.tunes_malloc]
            if precision == "bf16" and not options.only:
                entries.append(REAL_PATH_FP32)
            results = compete(
                [REAL_PATH, *entries],
                threads,
                precision,
                options.rounds,
                options.steps,
                options.cpu_seconds,
            )
            report(results, threads, precision)
            tables.append(
                {
                    "threads": threads,
                    "precision": precision,
                    "results": [dataclasses.asdict(result) for result in results],
                }
            )
    if options.json:
        options.json.write_text(json.dumps({"load_before": load, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()

"""Prove and measure the product on one GPU in ten minutes; without a GPU the same stages run shrunk on a CPU.

    python benchmarks/gpu_kit.py OUT [--budget 540] [--only env,maths,...]

Stages, correctness first: env, maths, compile, engine, sync, cli, growth, speed, loop, variants, peers. Each
is caught and timed. OUT/table.md has every measurement with its prediction or bound as soon as it is known,
OUT/kit.jsonl a record of each stage; a stage that hangs is cut off when the budget is spent. gpu_kit.md says
how to carry the packages to a machine without a network.
"""

import argparse
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_proofs
import gpu_speed
import torch
from gpu_stage import CUDA, Kit, Row

STAGES: dict[str, Callable[[Kit], Iterator[Row]]] = {
    "env": gpu_speed.env,
    "maths": gpu_proofs.maths,
    "compile": gpu_proofs.compile_law,
    "engine": gpu_proofs.engine,
    "sync": gpu_proofs.sync,
    "cli": gpu_proofs.cli,
    "growth": gpu_proofs.growth,
    "speed": gpu_speed.speed,
    "loop": gpu_speed.loop,
    "variants": gpu_speed.variants,
    "peers": gpu_speed.peers,
}


def _environment() -> str:
    lines = [
        f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        torch.cuda.get_device_name()
        if CUDA
        else "no GPU: every stage is shrunk, and no rate below means anything",
    ]
    if CUDA:
        lines.append(
            f"cuDNN {torch.backends.cudnn.version()}, "
            f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
        )
    return "\n".join(lines) + "\n"


class _Results:
    """What was measured, on the disk as soon as it is known: a table by rows, a record of each stage."""

    def __init__(self, folder: Path) -> None:
        self.failed = 0
        self._folder = folder
        self._lines = [_environment(), "| stage | what | measured | predicted | |", "|---|---|---:|---:|---|"]
        self._lock = threading.Lock()

    def begin(self, stage: str) -> None:
        print(f"{stage}:", flush=True)
        self._stage, self._rows, self._began = stage, list[Row](), time.monotonic()

    def add(self, row: Row) -> None:
        print(f"  {row.name:60} {row.measured:12.5g} {row.unit:9} {row.verdict}", flush=True)
        self._rows.append(row)
        self.failed += row.verdict.startswith("FAILED")
        predicted = f"{row.predicted:.5g} {row.unit}" if row.predicted else ""
        measured = f"{row.measured:.5g} {row.unit}"
        self._write(f"| {self._stage} | {row.name} | {measured} | {predicted} | {row.verdict} |")

    def end(self, error: str) -> None:
        with self._lock:
            seconds, rows = time.monotonic() - self._began, [dataclasses.asdict(row) for row in self._rows]
            record = {"stage": self._stage, "seconds": seconds, "rows": rows, "error": error}
            with (self._folder / "kit.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            if error:
                self.failed += 1
                self._write(f"| {self._stage} | **{error.splitlines()[-1][:200]}** | | | FAILED |")
                print(error, file=sys.stderr)
            print(f"  {self._stage}: {seconds:.1f} s", flush=True)

    def cut_off(self, kit: Kit) -> None:
        """End the process and what it runs: the budget is spent and a stage still runs, or hangs."""
        main = sys._current_frames()[threading.main_thread().ident or 0]
        stack = "".join(traceback.format_stack(main))[-4000:]
        self.end(f"{stack}cut off: the budget is spent")
        print(f"cut off; table: {self._folder / 'table.md'}", flush=True)
        kit.kill_command()
        os._exit(1)

    def _write(self, line: str) -> None:
        self._lines.append(line)
        (self._folder / "table.md").write_text("\n".join(self._lines) + "\n")


def _error_of(kit: Kit, stage: str, results: _Results) -> str:
    """Run a stage and return what went wrong, if anything."""
    try:
        if kit.left_s < 10:
            return "left out: the budget is spent"
        for row in STAGES[stage](kit):
            results.add(row)
    except Exception:  # noqa: BLE001 - the next stages can still tell something
        return traceback.format_exc()[-4000:]
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for kit.jsonl, table.md, env.txt and a profile")
    parser.add_argument(
        "--budget", type=float, default=540.0, help="seconds after which the kit ends, in a stage too"
    )
    parser.add_argument("--only", default=",".join(STAGES), help="stages, with commas between them")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--only {unknown[0]}: use some of {','.join(STAGES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "env.txt").write_text(_environment())
    print(_environment(), end="")
    kit, results = Kit(given.out.resolve(), given.budget), _Results(given.out)
    watchdog = threading.Timer(given.budget, results.cut_off, [kit])
    watchdog.daemon = True
    watchdog.start()
    for name in names:
        results.begin(name)
        results.end(_error_of(kit, name, results))
    watchdog.cancel()
    print(f"{results.failed} failed; table: {given.out / 'table.md'}")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())

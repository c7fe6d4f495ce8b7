"""Prove and measure the product on one GPU in ten minutes; without a GPU the same stages run shrunk on a CPU.

    python benchmarks/gpu_kit.py OUT [--budget 540] [--only env,maths,...]

Stages, correctness first: env, maths, compile, engine, sync, cli, growth, speed, loop, variants, peers. Each
is caught, timed and appended to OUT/kit.jsonl at once, so that a kill loses one stage; at the end
OUT/table.md has every measurement with its prediction or bound. gpu_kit.md says how to carry the
packages to a machine without a network.
"""

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_proofs
import gpu_speed
import torch
from gpu_stage import (
    CUDA,
    Kit,
    Row,
)

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


def _run_stage(kit: Kit, name: str) -> tuple[list[Row], str]:
    rows: list[Row] = []
    try:
        if kit.left_s < 10:
            return rows, "left out: the budget is spent"
        for row in STAGES[name](kit):
            rows.append(row)
            print(f"  {row.name:60} {row.measured:12.5g} {row.unit:9} {row.verdict}", flush=True)
    except Exception:  # noqa: BLE001 - the next stages can still tell something
        return rows, traceback.format_exc()[-4000:]
    return rows, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for kit.jsonl, table.md, env.txt and a profile")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no stage is begun")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, with commas between them")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--only {unknown[0]}: use some of {','.join(STAGES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "env.txt").write_text(_environment())
    print(_environment(), end="")
    kit, failed = Kit(given.out.resolve(), given.budget), 0
    table = ["| stage | what | measured | predicted | |", "|---|---|---:|---:|---|"]
    for name in names:
        print(f"{name}:", flush=True)
        began = time.monotonic()
        rows, error = _run_stage(kit, name)
        seconds = time.monotonic() - began
        record = {
            "stage": name,
            "seconds": seconds,
            "rows": [dataclasses.asdict(row) for row in rows],
            "error": error,
        }
        with (given.out / "kit.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        for row in rows:
            predicted = f"{row.predicted:.5g} {row.unit}" if row.predicted else ""
            table.append(
                f"| {name} | {row.name} | {row.measured:.5g} {row.unit} | {predicted} | {row.verdict} |"
            )
        if error:
            table.append(f"| {name} | **{error.strip().splitlines()[-1][:200]}** | | | FAILED |")
            print(error, file=sys.stderr)
        failed += sum(row.verdict.startswith("FAILED") for row in rows) + bool(error)
        (given.out / "table.md").write_text(_environment() + "\n" + "\n".join(table) + "\n")
        print(f"  {name}: {seconds:.1f} s", flush=True)
    print(f"{failed} failed; table: {given.out / 'table.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

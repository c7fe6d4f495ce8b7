"""How long growing a checkpoint takes compared with copying and reading it, and how much memory it needs.

    python benchmarks/grow_checkpoint.py --gigabytes 20 --sparse      peak memory at any size, little disk
    python benchmarks/grow_checkpoint.py --gigabytes 5                times, on random numbers

In one run on one disk: `cp` of the checkpoint, reading all of it, growing it with the tool from one rank's
files to those of tp 4. The embedding and the head are larger than 1 GiB from --gigabytes 16 on. A sparse
source holds zeros that lie nowhere on the disk; `cp` and the tool write them out.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from math import prod
from pathlib import Path

import numpy as np

from megatron_nexus.base.communicator import SingleProcess
from megatron_nexus.checkpoint.chunks import fragment_boxes
from megatron_nexus.checkpoint.data_file import (
    DTYPE,
    STATES,
    Chunk,
    block_checksums,
    chunk_starts,
    data_file_name,
    data_file_record,
    safetensors_header,
)
from megatron_nexus.checkpoint.manifest import (
    EngineRecord,
    JsonObject,
    Manifest,
    OptimizerRecord,
    RunProgress,
    Topology,
)
from megatron_nexus.checkpoint.new_checkpoint import NewCheckpoint
from megatron_nexus.config.command_line import build
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.spec.cost import parameter_count
from megatron_nexus.spec.shard import Shard

REPOSITORY = Path(__file__).parents[1]
MODEL = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "kv_channels": 128,
    "ffn_hidden_size": 5632,
    "nexus_m": 2304,
    "nexus_a": 2560,
}
GROWTH = ["--nexus-m", "2432", "--nexus-a", "2688", "--tp", "4"]
VOCABULARY_SHARE = 1 / 3


@cache
def checksums_of_zeros(count: int) -> tuple[int, ...]:
    return block_checksums(memoryview(bytes(count)))


def write_source(root: Path, gigabytes: float, sparse: bool) -> int:
    """A checkpoint of one rank of about that size; its parameters."""
    elements = gigabytes * 1e9 / (DTYPE.itemsize * len(STATES))
    vocabulary = int(VOCABULARY_SHARE * elements / 2 / MODEL["hidden_size"])
    sizes = {**MODEL, "vocab_size": vocabulary}
    layer = parameter_count(decoder_specs(build({**sizes, "num_layers": 2}).model).values())
    layer -= parameter_count(decoder_specs(build({**sizes, "num_layers": 1}).model).values())
    config = build({**sizes, "num_layers": max(1, round((1 - VOCABULARY_SHARE) * elements / layer))})
    specs = decoder_specs(config.model)
    checkpoint = NewCheckpoint(root, 1000, SingleProcess())
    checkpoint.begin()
    folder = checkpoint.folder
    shard = Shard(0, 1)
    chunks = [
        Chunk(spec.name, state, part.box)
        for spec in specs.values()
        for state in STATES
        for part in fragment_boxes(spec, shard, 0, prod(spec.shape))
    ]
    checksums = []
    largest = max(chunk.box.numel for chunk in chunks)
    random = np.random.default_rng(0).standard_normal(largest, dtype=np.float32)
    header = safetensors_header(chunks)
    with (folder / data_file_name([0])).open("wb") as file:
        file.write(header)
        for chunk in chunks:
            count = chunk.box.numel
            if sparse:
                checksums.append(checksums_of_zeros(count * DTYPE.itemsize))
            else:
                contents = random[:count].view(np.uint8).data
                checksums.append(block_checksums(contents))
                file.write(contents)
        file.truncate(chunk_starts(header, chunks)[-1])
        file.flush()
        os.fsync(file.fileno())
    record = data_file_record([0], header, chunks, checksums)
    group: JsonObject = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    manifest = Manifest(
        progress=RunProgress(1000, 0, 0, 0),
        specs=specs,
        optimizer=OptimizerRecord(1000, {"decay": group, "no_decay": group}),
        engine=EngineRecord(1000, 0, 0),
        topology=Topology(1, 1, 1, 1),
        config=dataclasses.asdict(config),
        tokenizer_fingerprint="",
        lineage=[],
    )
    checkpoint.finish(manifest, [record])
    return parameter_count(specs.values())


def timed_copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--sparse=never", "--reflink=never", source, target], check=True)
    for path in target.rglob("rank_*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def timed_reading(source: Path) -> float:
    began, buffer = time.perf_counter(), bytearray(1 << 24)
    for path in source.rglob("rank_*"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def timed_growth(source: Path, target: Path, workers: int) -> tuple[float, int]:
    """Seconds, and the largest memory of one process in bytes."""
    tool = str(REPOSITORY / "tools" / "grow_sharded_checkpoint.py")
    flags = ["--load", str(source), "--save", str(target), "--workers", str(workers), *GROWTH]
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, tool, *flags], check=True, env=environment, stdout=sys.stderr)
    seconds = time.perf_counter() - began
    # Of all descendants that have been waited for, the largest one; Linux counts in KiB.
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the checkpoint")
    parser.add_argument("--sparse", action="store_true", help="of zeros that take no room on the disk")
    parser.add_argument("--workers", type=int, default=2, help="of the tool")
    parser.add_argument("--folder", default=None, help="where to work; it is emptied at the end")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        needed = given.gigabytes * 1e9 * (1.15 if given.sparse else 2.15)
        free = shutil.disk_usage(folder).free
        if needed > free:
            sys.exit(f"{needed / 1e9:.0f} GB are needed in {folder}, which has {free / 1e9:.0f} GB")
        parameters = write_source(folder / "source", given.gigabytes, given.sparse)
        stored = sum(path.stat().st_size for path in (folder / "source").rglob("rank_*.safetensors"))
        # Before and after: the first to fill the system's cache may pay for its memory.
        copies_s = [timed_copy(folder / "source", folder / "copy")]
        growth_s, peak_bytes = timed_growth(folder / "source", folder / "grown", given.workers)
        written = sum(path.stat().st_size for path in (folder / "grown").rglob("rank_*.safetensors"))
        shutil.rmtree(folder / "grown")
        reading_s = timed_reading(folder / "source")
        copies_s.append(timed_copy(folder / "source", folder / "copy"))
        record = {
            "parameters": parameters,
            "source_bytes": stored,
            "sparse": given.sparse,
            "grown_bytes": written,
            "workers": given.workers,
            "copies_s": [round(seconds, 1) for seconds in copies_s],
            "reading_s": round(reading_s, 1),
            "growth_s": round(growth_s, 1),
            "ratio": round(growth_s / (sum(copies_s) / 2 + reading_s), 2),
            "peak_bytes_of_a_process": peak_bytes,
        }
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

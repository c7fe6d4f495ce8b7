"""Stages of gpu_kit.py that prove: numbers, compilation, engine, waits, resumption, growth."""

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gpu_stage import (
    BF16_BOUND,
    CUDA,
    FP32_BOUND,
    PRESET,
    SHRUNK,
    Kit,
    Row,
    engine_of,
    gradients,
    make_model,
    peak_gib,
    planned_gib,
    positions_of,
    synchronize,
    tokens_of,
    worst_error,
)

from megatron_nexus.config.command_line import build
from megatron_nexus.config.presets import Value
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter, token_dtype


def maths(kit: Kit) -> Iterator[Row]:
    """Loss and every gradient of each family against float64 on the CPU; the same step twice."""
    for preset in ("nexusformer-tiny", "qwen3-tiny", "tokenformer-tiny", "nexusformer-released-tiny"):
        config = build({"preset": preset})
        batch = tokens_of(config, 2, 256 if CUDA else 16)
        expected_loss, expected = gradients(*make_model(config, torch.float64, torch.device("cpu")), batch)
        for dtype, bound in ((torch.float32, FP32_BOUND), (torch.bfloat16, BF16_BOUND)):
            name = f"{preset} {str(dtype).removeprefix('torch.')}"
            stage, loss = make_model(config, dtype)
            value, found = gradients(stage, loss, batch)
            yield Row(f"{name}: worst gradient", worst_error(found, expected), "", at_most=bound)
            yield Row(f"{name}: loss", abs(value - expected_loss), "nats", at_most=bound)
            again = gradients(stage, loss, batch)[1]
            same = float(all(torch.equal(a, b) for a, b in zip(found, again, strict=True)))
            yield Row(f"{name}: the same bits twice", same)
            torch.use_deterministic_algorithms(True)
            try:
                twice = [gradients(stage, loss, batch)[1] for _ in range(2)]
            finally:
                torch.use_deterministic_algorithms(False)
            same = float(all(torch.equal(a, b) for a, b in zip(*twice, strict=True)))
            yield Row(f"{name}: the same bits twice, deterministic", same, at_least=1.0)


def compile_law(kit: Kit) -> Iterator[Row]:
    """Compiled blocks against eager ones in float32, at each granularity of recomputation."""
    for preset, recompute in (
        ("nexusformer-tiny", "none"),
        ("nexusformer-tiny", "selective"),
        ("nexusformer-tiny", "full"),
        ("qwen3-tiny", "none"),
        ("tokenformer-tiny", "selective"),
    ):
        config = build({"preset": preset})
        batch = tokens_of(config, 2, 256 if CUDA else 32)
        expected = gradients(*make_model(config, torch.float32, recompute=recompute), batch)[1]
        torch.compiler.reset()
        began = time.monotonic()
        stage, loss = make_model(config, torch.float32, recompute=recompute, compiled=True)
        found = gradients(stage, loss, batch)[1]
        yield Row(f"{preset} {recompute}: worst gradient", worst_error(found, expected), at_most=FP32_BOUND)
        yield Row(f"{preset} {recompute}: compilation", time.monotonic() - began, "s")
        if not CUDA:
            return  # a minute each on a CPU, where tests/parallel/test_layers.py has the law
    config = build({"preset": "nexusformer-tiny"})
    batch, positions = tokens_of(config, 2, 512), positions_of(2, 512, 5)
    dense = gradients(*make_model(config, torch.float32, apart="dense"), batch, positions)[1]
    for recompute in ("none", "selective", "full"):
        torch.compiler.reset()
        made = make_model(config, torch.float32, recompute=recompute, compiled=True, apart="flex")
        error = worst_error(gradients(*made, batch, positions)[1], dense)
        yield Row(f"documents by FlexAttention, {recompute}: worst gradient", error, at_most=FP32_BOUND)


def engine(kit: Kit) -> Iterator[Row]:
    """The real engine at each ZeRO stage and granularity: losses agree; the peak against the memory plan."""
    first: list[float] = []
    cases = [
        (1, "none", False),
        (2, "none", False),
        (3, "none", False),
        (1, "selective", False),
        (1, "full", False),
    ]
    for zero_stage, recompute, compiled in [*cases, *([(1, "none", True)] if CUDA else [])]:
        flags: dict[str, Value] = {
            "preset": PRESET,
            "zero_stage": zero_stage,
            "recompute_granularity": recompute,
            "compile": compiled,
        }
        before = torch.cuda.memory_allocated() if CUDA else 0
        with engine_of(kit, flags) as (made, config, batches):
            losses = [made.train_step(batches, 1e-3).loss for _ in range(4 if CUDA else 2)]
            peak = peak_gib() - before / 2**30
        first = first or losses
        name = f"ZeRO {zero_stage}, recompute {recompute}{', compiled' if compiled else ''}"
        yield Row(
            f"{name}: loss against ZeRO 1",
            max(abs(a - b) for a, b in zip(losses, first, strict=True)),
            "nats",
            at_most=1e-3 if not compiled else 1e-2,
        )
        if CUDA:
            yield Row(f"{name}: peak", peak, "GiB", planned_gib(config))


def sync(kit: Kit) -> Iterator[Row]:
    """How often a step has the host wait for the GPU, with 2 and 8 micro-batches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    for accumulation in (2, 8):
        with engine_of(kit, {"preset": PRESET, "global_batch_size": 4 * accumulation}) as (made, _, batches):
            made.train_step(batches, 1e-3)
            with Reads() as reads:
                made.train_step(batches, 1e-3)
            yield Row(f"values read by the host, {accumulation} micro-batches", reads.count, at_most=8)
            if CUDA:
                activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
                with torch.profiler.profile(activities=activities) as profile:
                    made.train_step(batches, 1e-3)
                    synchronize()
                events = profile.key_averages()
                waits = sum(e.count for e in events if "Synchronize" in e.key)
                yield Row(f"synchronizations in the profile, {accumulation} micro-batches", waits, at_most=12)
                if accumulation == 2:
                    profile.export_chrome_trace(str(kit.folder / "profile.json.gz"))


def _corpus(kit: Kit) -> Path:
    prefix = kit.folder / "corpus"
    if not prefix.with_suffix(".bin").exists():
        vocabulary = build({"preset": PRESET}).model.vocab_size
        rng = np.random.default_rng(0)
        with IndexedDatasetWriter(prefix, token_dtype(vocabulary)) as writer:
            for _ in range(64):
                writer.add_document(rng.zipf(1.3, 20_000).clip(1, vocabulary) - 1)
    return prefix


def _train(kit: Kit, name: str, steps: int, *flags: str) -> list[dict[str, float]]:
    folder = kit.folder / name
    kit.run(
        "pretrain_nexus.py",
        *("--data-path", str(_corpus(kit)), "--eval-iters", "0", "--bf16"),
        *("--lr-decay-style", "constant", "--micro-batch-size", "4", "--global-batch-size", "8"),
        *("--train-iters", str(steps), "--save", str(folder), "--log-interval", "5"),
        *(word for name, value in SHRUNK.items() for word in (f"--{name.replace('_', '-')}", str(value))),
        *(flags if "--load" in flags else ("--preset", PRESET, *flags)),
    )
    return _losses(folder)


def _losses(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]


def _train_whole(kit: Kit) -> list[dict[str, float]]:
    return _train(kit, "whole", 12, "--deterministic-mode", "--save-interval", "6")


def cli(kit: Kit) -> Iterator[Row]:
    """The command: a run in one piece and the same run resumed, deterministic: equal to the last bit."""
    whole = _train_whole(kit)
    for name, more in (("halves", ()), ("halves, async save", ("--async-save",))):
        folder = name.replace(", ", "_").replace(" ", "_")
        _train(kit, folder, 6, "--deterministic-mode", *more)
        halves = _train(kit, folder, 12, "--deterministic-mode", "--load", str(kit.folder / folder), *more)
        same = all(
            a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
            for a, b in zip(whole, halves, strict=True)
        )
        yield Row(f"run in {name} equals one in one piece", float(same), at_least=1.0)
        if not CUDA:
            return
    seconds = statistics.median(r["step_s"] for r in whole[4:]) if "step_s" in whole[0] else float("nan")
    yield Row("step of the command", seconds, "s")


def growth(kit: Kit) -> Iterator[Row]:
    """Grow a checkpoint of the run, verify it, and train on with it: the loss goes on where it was."""
    whole = kit.folder / "whole"
    if not whole.exists():
        _train_whole(kit)
    model = build({"preset": PRESET}).model
    sizes = ("--nexus-m", str(model.nexus_m + 64), "--nexus-a", str(model.nexus_a + 64))
    said = kit.run(
        "tools/grow_sharded_checkpoint.py",
        "--load",
        str(whole / "iter_0000006"),
        "--save",
        str(kit.folder / "grown"),
        *sizes,
        "--verify",
    )
    yield Row("verified", float("logits moved by at most" in said), at_least=1.0)
    grown = _train(kit, "grown", 8, "--load", str(kit.folder / "grown"))
    reference = next(record for record in _losses(whole) if record["step"] == grown[0]["step"])
    jump = abs(grown[0]["loss"] - reference["loss"])
    yield Row(
        "first losses of the grown and the ungrown model",
        jump,
        "nats",
        at_most=1e-3 if not CUDA else 3e-3,
    )

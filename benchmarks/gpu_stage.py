"""What the stages of gpu_kit.py share: rows of the table, the budget, models, engines and clocks."""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_nexus.config.command_line import build
from megatron_nexus.config.devices import Device, find_device
from megatron_nexus.config.presets import Value
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.kernels.cross_entropy import compiled_kernel
from megatron_nexus.models.decoder import DecoderStage, Loss, compile_blocks
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.parallel.mesh import Mesh, make_mesh
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.parallel.world import World
from megatron_nexus.planner.kernels import Kernel, Kind
from megatron_nexus.planner.memory import plan_memory
from megatron_nexus.planner.roofline import roofline_of
from megatron_nexus.planner.step_time import model_seconds, step_time
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.engine import Engine

# Read when CUDA starts.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

REPOSITORY = Path(__file__).resolve().parents[1]
CUDA = torch.cuda.is_available()
# What predictions are for; None where the device is not known, as on a CPU.
RECORD = find_device(torch.cuda.get_device_name()) if CUDA else None
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
MULTIPLE = 64 if CUDA else 1
PRESET = "nexusformer-20m" if CUDA else "nexusformer-tiny"
SHRUNK: Mapping[str, Value] = {} if CUDA else {"seq_length": 32}
COMPILER = "inductor" if CUDA else "aot_eager"  # half a minute a model on a CPU
FP32_BOUND, BF16_BOUND = 2e-5, 6e-2
"""Errors of gradients, in norm, from float64: sums of thousands of terms; 8 bits through a few layers."""


@dataclass(frozen=True)
class Row:
    """A line of the table: what was measured, and the bound or prediction it is held to."""

    name: str
    measured: float
    unit: str = ""
    predicted: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def verdict(self) -> str:
        """Whether a bound holds; of a prediction, measured over predicted."""
        if self.at_most is not None:
            return "ok" if self.measured <= self.at_most else f"FAILED: at most {self.at_most:g}"
        if self.at_least is not None:
            return "ok" if self.measured >= self.at_least else f"FAILED: at least {self.at_least:g}"
        return f"{self.measured / self.predicted:.2f} x" if self.predicted else ""


class Kit:
    """What the stages share: the folder, the end of the budget, the GEMM rate and the one-rank mesh."""

    def __init__(self, folder: Path, budget_s: float) -> None:
        self.folder = folder
        self.deadline = time.monotonic() + budget_s
        self.gemm_flops_per_s = 0.0
        self._mesh: Mesh | None = None
        self._command: subprocess.Popen[str] | None = None

    @property
    def left_s(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    @property
    def mesh(self) -> Mesh:
        """The mesh of this process alone, made at first use."""
        if self._mesh is None:
            self._mesh = make_mesh(World("none", 0, 1, 0, 1, "127.0.0.1", _free_port()), 1, 1)
        return self._mesh

    def run(self, *words: str) -> str:
        """Run a Python command in the repository and return what it prints.

        Raises TimeoutExpired where the budget is spent first; the command and its children are then killed.
        """
        path = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
        with subprocess.Popen(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a process group of its own
        ) as self._command:
            try:
                said, _ = self._command.communicate(timeout=max(30.0, self.left_s))
            finally:
                self.kill_command()
        assert self._command.returncode == 0, f"{words}: exit code {self._command.returncode}\n{said[-2000:]}"
        return said

    def kill_command(self) -> None:
        """Kill the command that is running, if one is, and all that it has started."""
        if self._command is not None and self._command.returncode is None:
            os.killpg(self._command.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `action` over `repeats` runs, after one to warm up."""
    action()
    samples = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        action()
        synchronize()
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def peak_gib() -> float:
    """The most memory that was allocated on the GPU since the last reset, in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else float("nan")


def reset_memory() -> None:
    """Free cached memory and reset the peak."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_model(
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device = DEVICE,
    recompute: str | None = None,
    compiled: bool = False,
    apart: Literal["", "dense", "flex"] = "",
) -> tuple[DecoderStage, Loss]:
    """Return the whole decoder and its loss, without DeepSpeed; `compiled` as by --compile.

    `apart`: documents are kept apart, by a dense mask or by FlexAttention.
    """
    context = LayerContext(
        TensorParallel(None),
        Shard(0, 1, MULTIPLE),
        config.training.seed,
        dtype,
        recompute=recompute or config.training.recompute_granularity,  # type: ignore[arg-type]
        reset_attention_mask=apart != "",
        group_projections=compiled or device.type == "cuda",
        flex_attention=apart == "flex",
    )
    stage = DecoderStage(config.model, range(config.model.num_layers + 2), context)
    loss = Loss(config.model, context.tp, context.shard)
    if compiled:
        compile_blocks(stage, COMPILER)
        loss.kernel = compiled_kernel(COMPILER)
    return stage.to(device), loss


def tokens_of(config: RunConfig, samples: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return random tokens and labels [samples, length] on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.model.vocab_size, (samples, length + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def positions_of(samples: int, length: int, documents: int) -> Tensor:
    """Return positions [samples, length] in documents of one length."""
    return (torch.arange(length) % -(-length // documents)).repeat(samples, 1)


def gradients(
    stage: DecoderStage, loss: Loss, batch: tuple[Tensor, Tensor], positions: Tensor | None = None
) -> tuple[float, list[Tensor]]:
    """Return the loss and every gradient of one forward and backward pass."""
    device = next(stage.parameters()).device
    stage.zero_grad(set_to_none=True)
    tokens = batch[0].to(device)
    stream = tokens if positions is None else (tokens, positions.to(device))
    value = loss(stage(stream), batch[1].to(device))
    value.backward()
    found = [p.grad.detach().clone() for p in stage.parameters() if p.grad is not None]
    return float(value), found


def worst_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest error of a gradient, in norm, relative to that gradient's norm."""
    return max(
        float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm().clamp_min(1e-30))
        for a, b in zip(found, expected, strict=True)
    )


@contextmanager
def engine_of(
    kit: Kit, flags: Mapping[str, Value]
) -> Iterator[tuple[Engine, RunConfig, Iterator[tuple[Tensor, Tensor]]]]:
    """An engine of `flags` with batches of random tokens; its memory is given back at the end."""
    from megatron_nexus.training.deepspeed_muon import import_muon_uncompiled

    import_muon_uncompiled()
    config = build({"precision": "bf16", "micro_batch_size": 4, "global_batch_size": 8, **SHRUNK, **flags})
    reset_memory()
    engine = Engine(config, kit.mesh)
    size, length = config.training.micro_batch_size, config.training.seq_length
    batches = (tokens_of(config, size, length, seed) for seed in range(10**9))
    try:
        yield engine, config, batches
    finally:
        engine.deepspeed.destroy()


def planned_gib(config: RunConfig) -> float:
    """The peak of one rank by the memory plan, in GiB."""
    return plan_memory(config, 1, DEVICE.type)[0].peak / 2**30


def predicted_model_rate(config: RunConfig, device: Device | None = RECORD) -> float | None:
    """Tokens/s of forward and backward alone, by the planner; None where the device is not known."""
    tokens = config.training.micro_batch_size * config.training.seq_length
    return tokens / model_seconds(config, device) if device else None


def predicted_step_rate(config: RunConfig, device: Device | None = RECORD) -> float | None:
    """Tokens/s of the whole step of one rank, by the planner; None where the device is not known."""
    return step_time(config, 1, device).tokens_per_s if device else None


def predicted_product_rate(m: int, k: int, n: int, device: Device | None = RECORD) -> float | None:
    """TFLOP/s of a product in bf16, by the planner; None where the device is not known."""
    if device is None:
        return None
    flops = 2.0 * m * k * n
    return flops / roofline_of(device, "bf16").seconds(Kernel(Kind.GEMM, flops, shape=(1, m, n, k))) / 1e12

"""The machine under a rank: threads, allocator, memory, and how fast it multiplies matrices."""

import ctypes
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from math import floor
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_nexus.config.run_config import Precision, RunConfig
from megatron_nexus.models.layer_context import DTYPES
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.parallel.collective_failure import TRACE_PREFIX
from megatron_nexus.parallel.mesh import Mesh

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_GEMM_BLOCK_S, _GEMM_BLOCKS = 0.1, 3

TESTED_TORCH = ("2.10", "2.13")
"""The oldest version that the laws are run on, and the newest."""


def untested_torch(version: str) -> str:
    """Return a warning where torch is older or newer than what is tested, else ""."""

    def of(release: str) -> tuple[int, ...]:
        return tuple(int(number) for number in release.split(".")[:2])

    oldest, newest = TESTED_TORCH
    if of(oldest) <= of(version) <= of(newest):
        return ""
    return (
        f"torch {version} is not among the versions that are tested, {oldest} to {newest}: "
        "if something fails, install one of those"
    )


def compile_problem(config: RunConfig, version: str, device: str) -> str:
    """Return why --compile cannot be used with the torch of `version` on a device type, with the remedy."""
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    if version.startswith("2.10.") and tp > 1:
        return (
            f"--compile with --tp {tp} fails in the partitioner of torch {version} for some models: drop "
            "--compile, or install torch 2.13"
        )
    if version.startswith("2.11.") and tp > 1 and not parallel.sequence_parallel:
        return (
            f"--compile with --tp {tp} and without --sequence-parallel gives zero gradients in silence on "
            f"torch {version}: add --sequence-parallel, drop --compile, or install torch 2.10 or 2.13"
        )
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        return (
            f"--compile needs a C++ compiler on CPUs, and there is no {compiler}: install it, or drop "
            "--compile"
        )
    return ""


def set_environment(config: RunConfig) -> None:
    """Set what CUDA's libraries read from the environment when they start, unless the user has set it."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # else 70 to 80 GB fragment
    if config.training.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # NCCL's flight recorder keeps the last collectives, and writes them where one times out.
    if not {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"} & os.environ.keys():
        os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] = "2000"
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def set_trace_prefix(run_dir: Path) -> None:
    """Have NCCL's flight recorder write into the folder of the run, unless the user has said where.

    It reads this when it writes for the first time; before, rank 0 has not broadcast the folder.
    """
    if not set(TRACE_PREFIX) & os.environ.keys():
        os.environ.update(dict.fromkeys(TRACE_PREFIX, str(run_dir.absolute() / "nccl_trace_rank_")))


def configure_torch(config: RunConfig, mesh: Mesh) -> None:
    """Set torch's threads, memory and choice of kernels in this process; a collective call."""
    set_num_threads(mesh)
    if mesh.device.type == "cpu":
        tune_malloc()
    # torch seeds its generators by chance. Nothing that trains draws from them, but checkpoints hold them.
    torch.manual_seed(config.training.seed)
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    if config.training.deterministic_mode:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_num_threads(mesh: Mesh) -> None:
    """Set torch's threads to this rank's cores, unless OMP_NUM_THREADS is set; a collective call."""
    cores = sorted(os.sched_getaffinity(0))
    on_host = mesh.control.gather_str_on_host(" ".join(map(str, cores)))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_of_rank(cores, [list(map(int, text.split())) for text in on_host]))


def threads_of_rank(mine: Sequence[int], on_host: Sequence[Sequence[int]]) -> int:
    """Return the threads of a rank that may use the cores `mine`, at least one.

    `on_host` are those that each rank of its host may use: under SLURM and MPI each rank may be bound to
    cores of its own, or all ranks of a host to the same ones.
    """
    users = Counter(core for cores in on_host for core in cores)
    return max(1, floor(sum(Fraction(1, users[core]) for core in mine)))


def tune_malloc() -> None:
    """Have glibc keep freed memory for the next step.

    glibc returns large blocks to the kernel at once, which then clears them again at every step: a quarter
    to a third of a training step on a CPU. Two mallopt calls make it keep them.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; other C libraries have other allocators
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def gemm_flops_per_s(mesh: Mesh, precision: Precision) -> float:
    """FLOP/s of all ranks together, multiplying square matrices at the same time; a collective call."""
    size = 1024 if mesh.device.type == "cpu" else 8192
    a = torch.randn(size, size, device=mesh.device).to(DTYPES[precision])
    b = torch.randn(size, size, device=mesh.device).to(DTYPES[precision])

    def multiply(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    multiply(1)
    mesh.control.barrier()
    times = max(1, round(_GEMM_BLOCK_S / max(multiply(1), 1e-6)))
    # The fastest of several blocks: whatever else the machine does only ever slows one down. A block is long
    # enough for ranks that share a core to take turns within it.
    fastest_s = min(multiply(times) for _ in range(_GEMM_BLOCKS))
    rate = torch.tensor(2.0 * size**3 * times / fastest_s, dtype=torch.float64)
    mesh.control.all_reduce(rate)
    return float(rate)


def peak_memory_bytes(mesh: Mesh) -> int:
    """Return the most memory this rank has held: of the device on CUDA, resident on a CPU."""
    if mesh.device.type == "cuda":
        return torch.cuda.max_memory_allocated(mesh.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PeakMemory:
    """The most memory that any rank has held, which the ranks share at --log-interval."""

    def __init__(self, mesh: Mesh, log_interval: int, beacon: Beacon) -> None:
        """`beacon` shows that this rank waits for the others."""
        self._mesh, self._interval, self._beacon = mesh, log_interval, beacon
        self._most = 0

    def bytes_after(self, step: int) -> int:
        """Return the most that any rank had held when the ranks last shared it, or that this one has held.

        They share it, a collective call, at the interval and the first time.
        """
        most = torch.tensor(max(self._most, peak_memory_bytes(self._mesh)))
        if self._mesh.world_size > 1 and (not self._most or step % self._interval == 0):
            self._beacon.mark(Phase.TIMES)
            self._mesh.control.all_reduce(most, dist.ReduceOp.MAX)
            self._beacon.mark(Phase.HOOKS)
        self._most = int(most)
        return self._most

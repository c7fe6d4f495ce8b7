"""DeepSpeed's Adam: on a CPU its vectorised one, on CUDA devices its fused one. Sealed for `deepspeed`.

DeepSpeed compiles them at their first use (about a minute). A process that is killed meanwhile leaves torch's
lock file behind, on which every later build would wait for ever; so the compiled files have a folder of their
own, in which a lock of the kernel, which ends with its process, lets one rank build at a time.
"""

import os
import platform
import shutil
import subprocess
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

from megatron_nexus.base.durable import LOCK_FILE, exclusive_lock
from megatron_nexus.data.default_corpus import cache_folder
from megatron_nexus.errors import raise_problems
from megatron_nexus.log import Progress
from megatron_nexus.parallel.mesh import Mesh


def build_deepspeed_adam(mesh: Mesh) -> None:
    """Compile and load the operator of this rank's device, or only load it; a collective call.

    Raises ConfigError, on every rank, where one has nothing to compile with.
    """
    on_cpu = mesh.device.type == "cpu"
    with Progress("compiling DeepSpeed's Adam, or loading it"):
        problems = sorted(filter(None, mesh.control.distinct_str(_problem(on_cpu))))
    raise_problems(f"--optimizer-impl deepspeed: {problem}" for problem in problems)


def deepspeed_adam(groups: list[dict[str, object]], device: torch.device) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for `device`, AdamW by default; `build_deepspeed_adam` has been called."""
    return (DeepSpeedCPUAdam if device.type == "cpu" else FusedAdam)(groups)


def _problem(on_cpu: bool) -> str:
    """Build and load; what stands in the way, with the remedy, or ""."""
    remedy = "use --optimizer-impl torch, or install "
    compiler = os.environ.get("CXX", "c++")
    if on_cpu and shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r} to compile it: {remedy}g++"
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        with exclusive_lock(folder / LOCK_FILE, waiting=nullcontext()):
            import cpuinfo  # which DeepSpeed asks twice, a second and a process each time

            cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
            for stale in folder.glob("*/lock"):
                stale.unlink()
            (CPUAdamBuilder if on_cpu else FusedAdamBuilder)().load(verbose=False)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"it cannot be compiled in {folder} ({reason}): {remedy}{'g++' if on_cpu else 'nvcc and g++'}"
    return ""


def _folder() -> Path:
    """Where compiled operators are kept: a folder for each machine, for they fit its processor alone."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder("") / "extensions")
    versions = f"torch-{torch.__version__}-deepspeed-{deepspeed.__version__}"
    return root / f"{versions}-{platform.node()}"

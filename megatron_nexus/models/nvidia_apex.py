"""NVIDIA's apex: its RMSNorm and Adam for CUDA devices. The one file sealed for `apex`.

apex is optional: built from its source, or shipped in NVIDIA's PyTorch image. PyPI has an unrelated package
of the same name, so that `import apex` alone proves nothing.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.config.run_config import NormImpl
from megatron_nexus.errors import raise_problems

#: The compiled extension behind each flag.
EXTENSIONS = {"--norm-impl": "fused_layer_norm_cuda", "--optimizer-impl": "amp_C"}
SOURCE = "https://github.com/NVIDIA/apex"


def require_apex(flags: list[str], device: torch.device) -> None:
    """Raise ConfigError where a flag's value `apex` cannot be served on `device`: why, and the remedy."""
    problems = []
    for flag in flags:
        problem = _fault(EXTENSIONS[flag])
        if not problem and device.type != "cuda":
            problem = "it runs on CUDA devices, and there are none"
        if problem:
            problems.append(f"{flag} apex: {problem}; or use {flag} torch")
    raise_problems(problems)


def _fault(extension: str) -> str:
    """Return the problem of the installed apex, with its remedy; "" if it is NVIDIA's with this extension."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return f"apex is not installed: build NVIDIA's from {SOURCE}, or use NVIDIA's PyTorch image"
    folders = [Path(place) for place in found.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        place = folders[0] if folders else found.origin
        return (
            f"{place} is not NVIDIA's apex but another package of that name, such as the Pyramid toolkit of "
            f"2013 on PyPI: pip uninstall apex, then build NVIDIA's from {SOURCE}"
        )
    try:
        importlib.import_module("apex.optimizers")
        importlib.import_module("apex.normalization")
        importlib.import_module(extension)
    except ImportError as error:
        return (
            f"NVIDIA's apex in {folders[0]} lacks its CUDA extensions ({error}): build it again from "
            f"{SOURCE} with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
        )
    return ""


def fused_adam(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """apex's FusedAdam over parameter groups, AdamW by default; `require_apex` has been asked."""
    from apex.optimizers import FusedAdam

    return FusedAdam(groups)


def rms_norm(impl: NormImpl) -> Callable[[Tensor, tuple[int, ...], Tensor, float], Tensor]:
    """Return RMSNorm by `impl`, a function of x, the shape of the gain, the gain, and epsilon."""
    match impl:
        case "torch":
            return F.rms_norm
        case "apex":
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine

            return lambda x, shape, gain, epsilon: fused_rms_norm_affine(x, gain, shape, epsilon)

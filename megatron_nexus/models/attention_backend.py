"""The kernel that attention runs on: what may be asked for, what torch takes, and why it is a slow one."""

import torch
from torch.nn.attention import SDPBackend

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.layer_context import DTYPES

_SLOW = {SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION}


def uses_flex_attention(config: RunConfig, device_type: str) -> bool:
    """Return whether documents are kept apart by FlexAttention, not by a dense mask."""
    if not config.data.reset_attention_mask or config.training.attention_backend == "sdpa":
        return False
    return config.training.compile and device_type == "cuda"


def flex_problem(config: RunConfig, device_type: str) -> str:
    """Return why --attention-backend flex cannot be used, with the remedy; "" where it can."""
    if config.training.attention_backend != "flex" or uses_flex_attention(config, device_type):
        return ""
    if not config.data.reset_attention_mask:
        return "--attention-backend flex is for --reset-attention-mask: give it too, or drop the flag"
    if device_type != "cuda":
        return (
            f"--attention-backend flex: torch's FlexAttention has no backward on {device_type} devices: use "
            "--attention-backend auto"
        )
    return "--attention-backend flex needs --compile: give it too, or use --attention-backend sdpa"


def attention_backend(config: RunConfig, device: torch.device) -> str:
    """Return the name of the kernel that attention takes on `device`, with the reason if it is a slow one."""
    if uses_flex_attention(config, device.type):
        return "flex"
    model, length = config.model, config.training.seq_length
    dtype = DTYPES[config.training.precision]
    has_mask = config.data.reset_attention_mask or 0 < model.sliding_window < length
    q, k = (
        torch.empty(1, heads, length, model.kv_channels, device=device, dtype=dtype, requires_grad=True)
        for heads in (model.num_attention_heads, model.query_groups)
    )
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device) if has_mask else None
    grouped = model.query_groups < model.num_attention_heads
    chosen = torch._fused_sdp_choice(q, k, k, mask, 0.0, not has_mask, scale=1.0, enable_gqa=grouped)
    backend = SDPBackend(chosen)
    name = backend.name.removesuffix("_ATTENTION").lower()
    if backend not in _SLOW:
        return name
    causes = {
        f"--kv-channels {model.kv_channels} is not a multiple of 8": model.kv_channels % 8 != 0,
        "--fp32": dtype == torch.float32,
        "a dense mask": has_mask,
        "grouped-query attention": grouped and backend == SDPBackend.MATH,
    }
    reason = ", ".join(cause for cause, is_so in causes.items() if is_so)
    return f"{name} ({reason})" if reason else name


def alignment_notes(config: RunConfig, device_type: str) -> list[str]:
    """Return what of the sizes keeps a GPU's matrix units from aligned loads."""
    model, notes = config.model, []
    if device_type == "cuda":
        if model.hidden_size % 64:
            notes.append(
                f"--hidden-size {model.hidden_size} is not a multiple of 64: matrix products are slower on "
                "GPUs"
            )
        if model.kv_channels % 8:
            notes.append(
                f"--kv-channels {model.kv_channels} is not a multiple of 8: the fast kernels of attention "
                "refuse it on GPUs, or copy"
            )
    return notes

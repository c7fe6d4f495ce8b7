"""Muon, an optimizer that DeepSpeed looks for in every engine. Sealed for `deepspeed`."""

import torch


def import_muon_uncompiled() -> None:
    """Import it before DeepSpeed does, and without torch's compiler: nothing here uses it.

    Its import asks torch to compile three functions, which imports the compiler: 1 to 2 s on each rank.
    """
    torch_compile = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = torch_compile

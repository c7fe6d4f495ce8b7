"""What the first lines of a run say of attention, and what of it is refused."""

import pytest
import torch

from megatron_nexus.config.command_line import build
from megatron_nexus.models.attention_backend import alignment_notes, attention_backend, flex_problem

pytestmark = pytest.mark.torch_versions
CPU = torch.device("cpu")


@pytest.mark.parametrize("flags", [{}, {"reset_attention_mask": True}, {"sliding_window": 4}], ids=str)
def test_the_kernel_that_torch_takes_is_named(flags: dict) -> None:
    assert attention_backend(build({"preset": "nexusformer-tiny", **flags}), CPU) == "flash"


def test_a_slow_kernel_comes_with_its_reason() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        named = attention_backend(build({"preset": "nexusformer-tiny", "reset_attention_mask": True}), CPU)
    assert named.startswith("math (") and "mask" in named


@pytest.mark.parametrize(
    ("flags", "device", "words"),
    [
        ({}, "cuda", ("--reset-attention-mask",)),
        ({"reset_attention_mask": True, "compile": True}, "cpu", ("cpu", "--attention-backend auto")),
        ({"reset_attention_mask": True}, "cuda", ("--compile", "--attention-backend sdpa")),
    ],
)
def test_flex_is_refused_where_it_cannot_be_used(flags: dict, device: str, words: tuple[str, ...]) -> None:
    problem = flex_problem(build({"attention_backend": "flex", **flags}), device)
    assert "--attention-backend flex" in problem and all(word in problem for word in words)
    assert flex_problem(build({"attention_backend": "auto", **flags}), device) == ""


def test_flex_is_taken_on_gpus_under_compile() -> None:
    config = build({"reset_attention_mask": True, "compile": True})
    assert attention_backend(config, torch.device("cuda")) == "flex"
    assert (
        flex_problem(
            build({"reset_attention_mask": True, "compile": True, "attention_backend": "flex"}), "cuda"
        )
        == ""
    )


def test_sizes_that_gpus_read_slowly_are_noted() -> None:
    notes = alignment_notes(build({"preset": "qwen3-380m"}), "cuda")
    assert any("--hidden-size 1300" in note for note in notes)
    assert any(
        "--kv-channels 68" in n for n in alignment_notes(build({"preset": "transformer++-640m"}), "cuda")
    )
    assert alignment_notes(build({"preset": "nexusformer-240m"}), "cuda") == []
    assert alignment_notes(build({"preset": "qwen3-380m"}), "cpu") == []

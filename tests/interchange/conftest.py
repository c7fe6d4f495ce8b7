"""transformers' own classes, computing in the precision of their weights."""

import math
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def float64_hf_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own norms and angles in float64 where the model is: they come rounded to float32."""

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def angles(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rope = self.config.rope_parameters
        size = getattr(self.config, "head_dim", self.config.hidden_size // self.config.num_attention_heads)
        f = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        if rope["rope_type"] == "llama3":
            wavelength, length = 2 * math.pi / f, rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            smooth = (length / wavelength - low) / (high - low)
            divided = f / rope["factor"]
            between = torch.where(smooth < 0, divided, (1 - smooth) * divided + smooth * f)
            f = torch.where(smooth > 1, f, between)
        turns = position_ids[..., None] * f
        return tuple(torch.cat((f, f), dim=-1).to(x.dtype) for f in (turns.cos(), turns.sin()))

    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "SmolLM3"):
        module = import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"{name}RotaryEmbedding"), "forward", angles)

"""transformers' own classes, computing in the precision of their weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3


@pytest.fixture
def exact_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own norms and angles in float64 where the model is: they come rounded to float32."""

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def angles(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        turns = position_ids[..., None] * self.config.rope_parameters["rope_theta"] ** -exponents
        return tuple(torch.cat((f, f), dim=-1).to(x.dtype) for f in (turns.cos(), turns.sin()))

    for module, name in ((modeling_llama, "Llama"), (modeling_qwen3, "Qwen3")):
        monkeypatch.setattr(getattr(module, f"{name}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"{name}RotaryEmbedding"), "forward", angles)

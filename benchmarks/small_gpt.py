"""A decoder of GPT-2's shape, the plainest peer: learned positions, LayerNorm, GELU of width 4 D, tied head.

T tokens, B batch, D hidden, N heads, H head size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal multi-head attention with one product for Q, K and V."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        qkv_BTN3H = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))
        q, k, v = (y_BTNH.transpose(1, 2) for y_BTNH in qkv_BTN3H.unbind(dim=2))
        mixed_BNTH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y_BTD: Tensor = self.output(mixed_BNTH.transpose(1, 2).flatten(2))
        return y_BTD


class Block(nn.Module):
    """x + attention(x), then x + feed_forward(x), pre-norm."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden, bias=False)
        self.attention = Attention(hidden, heads)
        self.feed_forward_norm = nn.LayerNorm(hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        y_BTD: Tensor = x_BTD + self.down(F.gelu(self.up(self.feed_forward_norm(x_BTD))))
        return y_BTD


class SmallGPT(nn.Module):
    """Token ids and labels -> mean cross entropy."""

    def __init__(self, vocabulary: int, tokens: int, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Embedding(tokens, hidden)
        self.blocks = nn.Sequential(*(Block(hidden, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Nats per token, a scalar."""
        x_BTD = self.embedding(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1]))
        logits_BTV = F.linear(self.norm(self.blocks(x_BTD)), self.embedding.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())

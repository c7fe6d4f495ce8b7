"""Sampling: which token follows, drawn from a model's logits.

Temperature divides the logits; top-k keeps the k likeliest tokens; top-p (nucleus, Holtzman et al., 2020)
the fewest likeliest ones whose probabilities sum to p. In this order, as is the custom.

V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0: always the likeliest."""
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return a token id, drawn in float64 on the CPU, so that a seed means the same on every device."""
    logits_V = logits_V.to("cpu", torch.float64)
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    logits_V, order_V = (logits_V / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        logits_V = logits_V[: sampling.top_k]
    probabilities_V = logits_V.softmax(dim=0)
    # A token stays while those before it have not reached p; the first one always does.
    before_V = probabilities_V.cumsum(dim=0) - probabilities_V
    probabilities_V[1:][before_V[1:] >= sampling.top_p] = 0.0
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])

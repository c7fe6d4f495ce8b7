"""Key-value cache: what attention keeps of earlier tokens, so that decoding computes every token once.

Rows of a batch may be prompts of different lengths: shorter ones are padded on the left, and each row's
positions count from its own first token.

B rows, T new tokens, S tokens held with the new ones, N heads of this rank, H head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nexus.models.packing import Packing


class LayerCache:
    """The tensors that one layer keeps of its tokens, by name: "k" and "v", or what an attention needs."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: dict[str, tuple[Tensor, int]] = {}

    def extend(self, name: str, new_BNTH: Tensor) -> Tensor:
        """Keep the values of new tokens; all that are kept under the name, [B, N, S, H]."""
        rows, heads, tokens, size = new_BNTH.shape
        if name not in self._held:
            self._held[name] = (new_BNTH.new_empty(rows, heads, self.capacity, size), 0)
        buffer, length = self._held[name]
        assert length + tokens <= self.capacity, f"{length} + {tokens} tokens, room for {self.capacity}"
        buffer[:, :, length : length + tokens] = new_BNTH
        self._held[name] = (buffer, length + tokens)
        return buffer[:, :, : length + tokens]

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self._held = {name: (buffer, min(length, held)) for name, (buffer, held) in self._held.items()}


class KeyValueCache:
    """The caches of a decoder's blocks, and how many tokens they hold."""

    def __init__(self, layers: int, capacity: int, padding: Sequence[int] = ()) -> None:
        """Room for `capacity` tokens a row; `padding`: how many of each row's first tokens are padding."""
        self.capacity = capacity
        self.layers = [LayerCache(capacity) for _ in range(layers)]
        self.padding = tuple(padding)
        self.length = 0

    def advance(self, tokens: int, device: torch.device) -> Packing:
        """Count `tokens` new ones in; return their positions and what they attend to, for the blocks."""
        first, self.length = self.length, self.length + tokens
        place_T1 = torch.arange(first, self.length, device=device)[:, None]
        padding_B = torch.tensor(self.padding or (0,), device=device)
        mask_B1TS = None
        if any(self.padding) or (first > 0 and tokens > 1):
            place_S = torch.arange(self.length, device=device)
            # Padding sees itself, or its softmax would be of nothing.
            real_BTS = (place_S >= padding_B[:, None, None]) | (place_S == place_T1)
            mask_B1TS = (real_BTS & (place_S <= place_T1))[:, None]
        return Packing((place_T1 - padding_B).clamp_min(0), mask_B1TS)

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`, to go on from them in another way."""
        self.length = min(length, self.length)
        for layer in self.layers:
            layer.rewind(length)

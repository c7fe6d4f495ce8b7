"""Decoding: the texts of a batch go on token by token, each token computed once.

B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nexus.evaluation.loaded_model import LoadedModel, require_finite
from megatron_nexus.models.kv_cache import KeyValueCache


class Decoding:
    """Prompts that have been read, ready to go on, again and again from where the prompts end."""

    def __init__(
        self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int, vocab_size: int
    ) -> None:
        """Read prompts, none of them empty, with room for `new_tokens` behind the longest.

        `vocab_size`: of the tokenizer; what the model has beyond it means nothing and is never likely.
        """
        assert all(prompts), "an empty prompt has nothing to go on from"
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * left + list(prompt) for left, prompt in zip(padding, prompts, strict=True)]
        self._loaded = loaded
        self._vocab_size = vocab_size
        self._prompt_length = longest
        self._cache = KeyValueCache(loaded.model.num_layers, longest + new_tokens, padding)
        #: Logits [B, V] of the first token behind each prompt.
        self.first_logits_BV = self._decode(torch.tensor(rows))

    def _decode(self, tokens_BT: Tensor) -> Tensor:
        device = self._loaded.device
        logits_BV = self._loaded.decoder.decode(tokens_BT.to(device), self._cache)
        return require_finite(logits_BV[:, : self._vocab_size], self._loaded)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row and return the logits [B, V] of the next."""
        return self._decode(torch.tensor(tokens)[:, None])

    def restart(self) -> None:
        """Restart from the end of the prompts."""
        self._cache.rewind(self._prompt_length)

"""A text continued token by token by a trained model, shown as it comes, never half a character."""

from collections.abc import Iterator, Sequence

import torch

from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.evaluation.decoding import Decoding
from megatron_nexus.evaluation.sampling import Sampling, draw

CUT_OFF = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes cut-off characters to."""
OPEN_BYTES = 3
"""Bytes of a UTF-8 character without its last: so many tokens, at most, may wait for the next."""
CONTEXT_TOKENS = 16
"""How many tokens are decoded again with each new one, which may decode differently alone."""


class TextStream:
    """The text of tokens that follow a prompt, in parts that add up to all of it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT_TOKENS:])
        self._shown = len(tokenizer.decode(self._ids))

    def push(self, token: int) -> str:
        """Return the text that is complete after one more token and has not been returned before."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        open_characters = min(OPEN_BYTES, len(text) - len(text.rstrip(CUT_OFF)))
        new = self._new(text[: len(text) - open_characters])
        if open_characters == 0 and len(self._ids) > 2 * CONTEXT_TOKENS:
            del self._ids[:-CONTEXT_TOKENS]
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def finish(self) -> str:
        """Return the rest, incomplete characters included."""
        return self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        part = text[self._shown :]
        self._shown += len(part)
        return part


def continue_text(
    decoding: Decoding,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[str]:
    """Yield what each drawn token adds to the text, up to the end token or `new_tokens` of them.

    `decoding` has read the token ids `prompt` alone and starts behind them; a seed repeats the text.
    """
    decoding.restart()
    generator = torch.Generator().manual_seed(seed)
    stream = TextStream(tokenizer, list(prompt))
    logits_BV = decoding.first_logits_BV
    for number in range(1, new_tokens + 1):
        token = draw(logits_BV[0], sampling, generator)
        if token == tokenizer.eod_id:
            break
        yield stream.push(token)
        if number < new_tokens:
            logits_BV = decoding.extend([token])
    yield stream.finish()

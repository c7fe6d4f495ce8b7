"""A text continued token by token by a trained model."""

from collections.abc import Iterator, Sequence

import torch

from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.evaluation.decoding import Decoding
from megatron_nexus.evaluation.sampling import Sampling, draw
from megatron_nexus.evaluation.text_stream import TextStream


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

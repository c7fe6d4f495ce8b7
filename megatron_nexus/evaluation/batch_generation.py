"""Generation for tasks: many prompts at once, each up to a stop text, its end token or its last token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_nexus.data.tokenizer import Tokenizer, encode_prompt
from megatron_nexus.errors import DataError
from megatron_nexus.evaluation.decoding import Decoding
from megatron_nexus.evaluation.loaded_model import LoadedModel
from megatron_nexus.evaluation.sampling import Sampling, draw
from megatron_nexus.log import Progress

ROWS_PER_BATCH = 32
SEED = 1234


@dataclass(frozen=True)
class Stop:
    """When a text ends."""

    texts: tuple[str, ...]
    new_tokens: int


def generate_texts(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    stop: Stop,
) -> list[str]:
    """Return the continuation of each prompt, without the text that stopped it.

    Prompts are cut on the left so that they and the new tokens are what the model sees at once.

    Raises DataError: the new tokens alone are as many.
    """
    room = loaded.seq_length - stop.new_tokens
    if room < 1:
        raise DataError(
            f"the task asks for up to {stop.new_tokens} new tokens, and the model sees {loaded.seq_length} "
            "at once, the prompt included: choose a model of longer samples"
        )
    ids = [encode_prompt(tokenizer, prompt)[-room:] for prompt in prompts]
    # Prompts of similar length go together: shorter ones are padded.
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]), reverse=True)
    generator = torch.Generator().manual_seed(SEED)
    texts: dict[int, str] = {}
    with Progress("generating", len(ids), "texts") as progress:
        for begin in range(0, len(order), ROWS_PER_BATCH):
            batch = order[begin : begin + ROWS_PER_BATCH]
            made = _generate(loaded, tokenizer, [ids[number] for number in batch], sampling, stop, generator)
            texts |= dict(zip(batch, made, strict=True))
            progress.advance(len(batch))
    return [texts[number] for number in range(len(prompts))]


def _generate(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Stop,
    generator: torch.Generator,
) -> list[str]:
    decoding = Decoding(loaded, prompts, stop.new_tokens, tokenizer.vocab_size)
    rows: list[list[int]] = [[] for _ in prompts]
    texts: list[str | None] = [None] * len(rows)
    logits_BV = decoding.first_logits_BV
    for step in range(stop.new_tokens):
        tokens = [draw(logits_V, sampling, generator) for logits_V in logits_BV]
        for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if texts[number] is None:
                texts[number] = _ended(tokenizer, row, token, stop)
        if all(text is not None for text in texts):
            break
        if step + 1 < stop.new_tokens:
            logits_BV = decoding.extend(tokens)
    return [
        text if text is not None else tokenizer.decode(row) for row, text in zip(rows, texts, strict=True)
    ]


def _ended(tokenizer: Tokenizer, row: list[int], token: int, stop: Stop) -> str | None:
    """Append a token; return the whole text where it ends here, else None."""
    if token == tokenizer.eod_id:
        return tokenizer.decode(row)
    row.append(token)
    text = tokenizer.decode(row)
    found = [text.index(end) for end in stop.texts if end and end in text]
    return text[: min(found)] if found else None

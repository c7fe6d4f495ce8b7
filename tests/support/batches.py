"""Batches of tokens and texts to score, the same for every topology. Imports no engine."""

import torch
from torch import Tensor

from megatron_nexus.models.scores import Request

STEPS = 3

Batch = tuple[Tensor, Tensor]


def global_batches(vocab_size: int, samples: int, seq_length: int) -> list[Batch]:
    """The same token ids for every topology: STEPS batches of (tokens, labels) [samples, seq_length]."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(0, vocab_size, (samples, seq_length + 1), generator=generator)
        made.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return made


def document_positions(samples: int, seq_length: int) -> Tensor:
    """Documents of every length in the samples of each batch, [samples, seq_length]."""
    generator = torch.Generator().manual_seed(8)
    begins = torch.rand(samples, seq_length, generator=generator) < 0.3
    begins[:, 0] = True
    places = torch.arange(seq_length).expand(samples, -1)
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def scoring_requests(vocab_size: int, seq_length: int, every_last_token: bool) -> list[Request]:
    """Texts of many lengths, of which a number of last tokens is scored; and one with every last token.

    The latter are many: one case of each topology asks them.
    """
    generator = torch.Generator().manual_seed(9)
    lengths = [(seq_length + 1, seq_length), (2, 1), (seq_length, 3), *((n, n // 2) for n in (4, 7, 10))]
    texts = [(torch.randint(0, vocab_size, (n,), generator=generator).tolist(), k) for n, k in lengths]
    if every_last_token:
        texts += [([*texts[0][0][:2], last], 1) for last in range(vocab_size)]
    return [Request(tuple(tokens[:-k]), tuple(tokens[-k:])) for tokens, k in texts]

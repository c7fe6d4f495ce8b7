"""Scoring by a loaded model: contexts that requests share are computed once.

The continuations of one context stand behind it in one row, each of which sees the context and itself and
counts its positions on from the context; one-token continuations need no place of their own, for their
scores are read where the context ends. The head runs only where something is scored. Rows of similar
length go together, padded on the right, where nothing sees the padding.

    row:        c c c c a a a b b          positions:  0 1 2 3 4 5 6 4 5

B rows, T tokens, K scored places, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_nexus.evaluation.loaded_model import LoadedModel, require_finite
from megatron_nexus.log import Progress
from megatron_nexus.models.packing import Packing
from megatron_nexus.models.rotary import stage_tables
from megatron_nexus.models.scores import Request, Score, Tokens, fit

TOKENS_PER_PASS = 4096
"""Tokens of a forward pass, padding included."""
SCORED_PER_PASS = 1024
"""Places whose logits are in memory at once: K x V numbers, the largest tensor of scoring."""


@dataclass
class Row:
    """A context and continuations of it, by the number of their request."""

    context: Tokens
    tokens: list[int]
    branch: list[int]
    """For each token 0 in the context, then the number of its continuation in the row."""
    places: dict[int, list[int]] = field(default_factory=dict)
    """The positions at which the tokens of each request are predicted."""

    def add(self, number: int, continuation: Tokens) -> None:
        """Append a continuation, all but its last token, which predicts nothing."""
        begin, count = len(self.tokens), len(continuation) - 1
        self.places[number] = [len(self.context) - 1, *range(begin, begin + count)]
        self.tokens += continuation[:-1]
        self.branch += [len(self.places)] * count

    @property
    def branches(self) -> int:
        """Continuations that have tokens in the row: of a single one each token sees all before it."""
        return len(set(self.branch)) - 1


def make_rows(requests: Sequence[Request], longest: int) -> list[Row]:
    """Return rows of at most `longest` tokens, the longest first; requests with one context share a row."""
    rows: list[Row] = []
    open_rows: dict[Tokens, Row] = {}
    for number, request in enumerate(requests):
        row = open_rows.get(request.context)
        if row is None or len(row.tokens) + len(request.continuation) - 1 > longest:
            row = Row(request.context, list(request.context), [0] * len(request.context))
            open_rows[request.context] = row
            rows.append(row)
        row.add(number, request.continuation)
    return sorted(rows, key=lambda row: len(row.tokens), reverse=True)


class LocalScorer:
    """Scores by a decoder in this process."""

    def __init__(self, loaded: LoadedModel, tokens_per_pass: int = TOKENS_PER_PASS) -> None:
        self.seq_length = loaded.seq_length
        self._loaded = loaded
        self._tokens_per_pass = tokens_per_pass

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request, cut on the left to the model's length."""
        fitting = [fit(request, self.seq_length) for request in requests]
        rows = make_rows(fitting, max(self.seq_length, self._tokens_per_pass // 4))
        scores: dict[int, Score] = {}
        with Progress("scoring", sum(len(row.tokens) for row in rows), "tokens") as progress:
            # Rows whose tokens see all before them need no mask, and take the faster kernel.
            for masked in (False, True):
                for batch in self._batches([row for row in rows if (row.branches > 1) is masked]):
                    scores |= self._score_batch(batch, fitting, masked)
                    progress.advance(sum(len(row.tokens) for row in batch))
        return [scores[number] for number in range(len(requests))]

    def _batches(self, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
        """Yield batches of rows, the longest first, each as large as fits one forward pass."""
        begin = 0
        while begin < len(rows):
            count = max(1, self._tokens_per_pass // len(rows[begin].tokens))
            yield rows[begin : begin + count]
            begin += count

    def _score_batch(
        self, rows: Sequence[Row], requests: Sequence[Request], masked: bool
    ) -> dict[int, Score]:
        length = len(rows[0].tokens)
        tokens_BT = torch.zeros(len(rows), length, dtype=torch.int64)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row.tokens)] = torch.tensor(row.tokens)
        x_TBD = self._activations(tokens_BT, _packing(rows, length) if masked else None)
        # Every scored place: its row and column in the batch, and the token that is asked for there.
        numbers = [number for row in rows for number in row.places]
        places = [(t, b) for b, row in enumerate(rows) for at in row.places.values() for t in at]
        asked = [token for number in numbers for token in requests[number].continuation]
        log_p_K, likeliest_K = self._read(x_TBD, torch.tensor(places), torch.tensor(asked))
        scores, end = {}, 0
        for number in numbers:
            begin, end = end, end + len(requests[number].continuation)
            log_p = float(log_p_K[begin:end].double().sum())
            scores[number] = Score(log_p, bool(likeliest_K[begin:end].all()))
        return scores

    def _activations(self, tokens_BT: Tensor, packing: Packing | None) -> Tensor:
        """Return the input of the head, [T, B, D]."""
        device = self._loaded.device
        embedding, *blocks, _ = self._loaded.decoder.layers
        if packing is not None:
            assert packing.positions_TB is not None and packing.mask_B1TT is not None, "both are made"
            packing = Packing(packing.positions_TB.to(device), packing.mask_B1TT.to(device))
        x_TBD: Tensor = embedding(tokens_BT.to(device))
        positions_TB = packing.positions_TB if packing is not None else None
        tables = stage_tables(self._loaded.decoder.model, len(x_TBD), x_TBD, positions_TB)
        for block in blocks:
            x_TBD = block(x_TBD, tables, packing)
        return x_TBD

    def _read(self, x_TBD: Tensor, places_K2: Tensor, asked_K: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability [K] of each token asked for, and whether it is the argmax."""
        head, device = self._loaded.decoder.layers[-1], self._loaded.device
        log_p, likeliest = [], []
        for places, asked in zip(
            places_K2.to(device).split(SCORED_PER_PASS),
            asked_K.to(device).split(SCORED_PER_PASS),
            strict=True,
        ):
            logits_KV = head(x_TBD[places[:, 0], places[:, 1]][None])[0]
            logits_KV = logits_KV.to(torch.promote_types(logits_KV.dtype, torch.float32))
            chosen_K = logits_KV.gather(1, asked[:, None])[:, 0]
            log_p_K = chosen_K - logits_KV.logsumexp(dim=1)
            log_p.append(require_finite(log_p_K, self._loaded).cpu())
            likeliest.append((logits_KV.argmax(dim=1) == asked).cpu())
        return torch.cat(log_p), torch.cat(likeliest)


def _packing(rows: Sequence[Row], length: int) -> Packing:
    """Return positions and mask of rows with several continuations; padding is not masked."""
    branch_BT = torch.zeros(len(rows), length, dtype=torch.int64)
    positions_BT = torch.arange(length).repeat(len(rows), 1)
    for b, row in enumerate(rows):
        branch_BT[b, : len(row.branch)] = torch.tensor(row.branch)
        for places in row.places.values():
            if len(places) > 1:
                first = len(row.context)
                positions_BT[b, places[1] : places[-1] + 1] = torch.arange(first, first + len(places) - 1)
    own_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    of_context_BTT = branch_BT[:, None, :] == 0
    return Packing(positions_BT.t(), (own_BTT | of_context_BTT).tril()[:, None])

"""Scoring during training: how likely the model finds the ends of texts, by its own ranks at any topology.

Rank 0 asks and all ranks compute: the texts go to every rank over the control group, each data-parallel
copy takes its share through the engine, and the scores come back as one sum over ranks. Nothing is
computed once for several texts, as an evaluation of a checkpoint does: the layers' own forward runs here.

B rows, T tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.engine import Engine

Text: TypeAlias = tuple[Sequence[int], int]
"""Token ids, and how many of the last ones are scored."""
TextScore: TypeAlias = tuple[float, bool]
"""Their log-likelihood in nats, and whether each is the likeliest token at its place."""
ScoreTexts: TypeAlias = Callable[[Sequence[Text]], list[TextScore]]
Scores: TypeAlias = Mapping[str, Mapping[str, float]]
"""What the model reaches in each task, by metric."""
TaskEvaluator: TypeAlias = Callable[[ScoreTexts], Scores]
"""Who asks for scores and makes of them what the model reaches."""


class DistributedScorer:
    """The ranks of a run as one model that scores texts."""

    def __init__(self, config: RunConfig, mesh: Mesh, engine: Engine) -> None:
        self._mesh = mesh
        self._engine = engine
        training = config.training
        # What training has room for, forward and backward, evaluation has.
        self._tokens_per_pass = training.micro_batch_size * training.seq_length
        self._width_multiple = mesh.tp_size if config.parallel.sequence_parallel else 1
        # Stages of a pipeline work at the same time on as many micro-batches.
        self._passes = 2 * mesh.pp_size if mesh.pp_size > 1 else 1

    def run(self, evaluator: TaskEvaluator | None) -> Scores:
        """Have `evaluator`, which rank 0 has, ask as it likes; there, what it found; a collective call."""
        if self._mesh.rank == 0:
            assert evaluator is not None, "rank 0 asks"
            found = evaluator(self._ask)
            self._send([])
            return found
        while texts := self._receive():
            self._score(texts)
        return {}

    def _ask(self, texts: Sequence[Text]) -> list[TextScore]:
        if not texts:  # which would end the others' part
            return []
        self._send(texts)
        return self._score(texts)

    def _send(self, texts: Sequence[Text]) -> None:
        """Rank 0 hands texts to all ranks; none: it has no more."""
        shape = torch.tensor([len(texts), sum(len(tokens) for tokens, _ in texts)])
        dist.broadcast(shape, 0, group=self._mesh.control)
        if texts:
            facts = torch.tensor([(len(tokens), count) for tokens, count in texts])
            dist.broadcast(facts, 0, group=self._mesh.control)
            flat = torch.tensor([token for tokens, _ in texts for token in tokens])
            dist.broadcast(flat, 0, group=self._mesh.control)

    def _receive(self) -> list[Text]:
        shape = torch.empty(2, dtype=torch.int64)
        dist.broadcast(shape, 0, group=self._mesh.control)
        count, total = shape.tolist()
        if not count:
            return []
        facts, flat = torch.empty(count, 2, dtype=torch.int64), torch.empty(total, dtype=torch.int64)
        dist.broadcast(facts, 0, group=self._mesh.control)
        dist.broadcast(flat, 0, group=self._mesh.control)
        rows = flat.split(facts[:, 0].tolist())
        return [(row.tolist(), scored) for row, scored in zip(rows, facts[:, 1].tolist(), strict=True)]

    def _score(self, texts: Sequence[Text]) -> list[TextScore]:
        """The score of each text, on every rank; a collective call."""
        mesh = self._mesh
        sums_N2 = torch.zeros(len(texts), 2, dtype=torch.float64)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number][0]), reverse=True)
        begin = 0
        while begin < len(order):
            longest = len(texts[order[begin]][0]) - 1
            width = -(-longest // self._width_multiple) * self._width_multiple
            rows = max(1, self._tokens_per_pass // width)
            work_items = rows * self._passes
            mine = order[begin + mesh.dp_rank * work_items : begin + (mesh.dp_rank + 1) * work_items]
            parts = [mine[i * rows : (i + 1) * rows] for i in range(self._passes)]
            batches = [_batch([texts[number] for number in part], rows, width) for part in parts]
            scored = self._engine.score(batches)
            # The ranks that share a copy of the model find the same: the first of them tells.
            if scored and mesh.tp_rank == 0:
                for part, scores_2BT in zip(parts, scored, strict=True):
                    for row, number in enumerate(part):
                        tokens, count = texts[number]
                        ends_2K = scores_2BT[:, row, len(tokens) - 1 - count : len(tokens) - 1].double().cpu()
                        sums_N2[number] = torch.stack([ends_2K[0].sum(), ends_2K[1].prod()])
            begin += work_items * mesh.dp_size
        dist.all_reduce(sums_N2, group=mesh.control)
        return [(log_p, bool(greedy)) for log_p, greedy in sums_N2.tolist()]


def _batch(texts: Iterable[Text], rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, T], padded on the right, where no token sees them, and with empty rows."""
    tokens_BT = torch.zeros(rows, width, dtype=torch.int64)
    labels_BT = torch.zeros(rows, width, dtype=torch.int64)
    for row, (tokens, _) in enumerate(texts):
        text = torch.tensor(tokens)
        tokens_BT[row, : len(text) - 1] = text[:-1]
        labels_BT[row, : len(text) - 1] = text[1:]
    return tokens_BT, labels_BT

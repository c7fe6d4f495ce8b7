"""Scoring during training: log-likelihoods of continuations, by the ranks that train, at any topology.

Rank 0 asks and all ranks compute: requests are broadcast over the control group, each data-parallel copy
scores its part through the engine, and one all-reduce sums the scores. Unlike the evaluation of a
checkpoint, requests with one context do not share its computation: this is the engine's own forward pass.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_nexus.base.json_text import parse_record
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answers import AnswerTokens
from megatron_nexus.data.loader import tokens_and_labels
from megatron_nexus.models.scores import Request, Score, Scorer, fit
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.stage_module import Output

TaskScores: TypeAlias = Mapping[str, Mapping[str, float]]
"""The metrics of each task, by name."""
TaskEvaluator: TypeAlias = Callable[[Scorer], TaskScores]
"""Evaluates tasks with a model that scores continuations."""


class DistributedScorer:
    """The ranks of a run as one model that scores continuations: a `Scorer` on rank 0."""

    def __init__(self, config: RunConfig, mesh: Mesh, engine: Engine) -> None:
        self._mesh = mesh
        self._engine = engine
        training = config.training
        self.seq_length = training.seq_length
        # What training has room for, forward and backward, evaluation has.
        self._tokens_per_pass = training.micro_batch_size * training.seq_length
        self._width_multiple = mesh.tp_size if config.parallel.sequence_parallel else 1

    def run(self, evaluator: TaskEvaluator | None) -> TaskScores:
        """Run `evaluator` on rank 0 while the others compute; return its scores there. A collective call."""
        if self._mesh.rank == 0:
            assert evaluator is not None, "rank 0 asks"
            found = evaluator(self)
            self._send([])
            return found
        while requests := self._receive():
            self._score(requests)
        return {}

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request; rank 0 calls this within `run`.

        Raises DataError where a continuation is too long.
        """
        if not requests:  # an empty broadcast ends `run` on the other ranks
            return []
        fitting = [fit(request, self.seq_length) for request in requests]
        self._send(fitting)
        return self._score(fitting)

    def _send(self, requests: Sequence[Request]) -> None:
        """Broadcast requests from rank 0; none ends the other ranks' part."""
        self._mesh.control.broadcast_str(json.dumps([(one.context, one.continuation) for one in requests]))

    def _receive(self) -> list[Request]:
        return [Request(*map(tuple, parts)) for parts in parse_record(self._mesh.control.broadcast_str(""))]

    def _score(self, requests: Sequence[Request]) -> list[Score]:
        """Return the score of each request, on every rank; a collective call."""
        mesh, passes = self._mesh, passes_at_once(self._mesh)
        texts = [request.context + request.continuation for request in requests]
        sums_N2 = torch.zeros(len(texts), 2, dtype=torch.float64)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]), reverse=True)
        begin = 0
        while begin < len(order):
            longest = len(texts[order[begin]]) - 1
            width = -(-longest // self._width_multiple) * self._width_multiple
            rows = max(1, self._tokens_per_pass // width)
            numbers = order[begin : begin + rows * passes * mesh.dp_size]
            samples = {number: AnswerTokens(texts[number], 1) for number in numbers}
            output = self._engine.logits_loss.token_scores
            for number, scores_2T in numbered_outputs(
                self._engine, mesh, samples, rows, width, passes, output
            ):
                # Tensor-parallel ranks have the same scores: the first of them adds its own.
                if mesh.tp_rank == 0:
                    first, last = len(requests[number].context) - 1, len(texts[number]) - 1
                    ends_2K = scores_2T[:, first:last].double().cpu()
                    sums_N2[number] = torch.stack([ends_2K[0].sum(), ends_2K[1].prod()])
            begin += len(numbers)
        mesh.control.all_reduce(sums_N2)
        return [Score(log_p, bool(greedy)) for log_p, greedy in sums_N2.tolist()]


def passes_at_once(mesh: Mesh) -> int:
    """Return how many micro-batches to ask for at once: the stages of a pipeline work on as many."""
    return 2 * mesh.pp_size if mesh.pp_size > 1 else 1


def numbered_outputs(
    engine: Engine,
    mesh: Mesh,
    samples: Mapping[int, AnswerTokens],
    rows: int,
    width: int,
    passes: int,
    output: Output,
) -> Iterator[tuple[int, Tensor]]:
    """Yield, on the last stage, this data-parallel rank's samples by number with their part of `output`.

    Each rank takes `passes` micro-batches of `rows`, padded to `width` tokens; the outputs have the samples
    along the second axis. A collective call.
    """
    mine = list(samples)[mesh.dp_rank * rows * passes : (mesh.dp_rank + 1) * rows * passes]
    parts = [mine[i * rows : (i + 1) * rows] for i in range(passes)]
    batches = [tokens_and_labels([samples[number] for number in part], rows, width) for part in parts]
    for part, made in zip(parts, engine.outputs(batches, output), strict=False):
        yield from zip(part, made.unbind(dim=1), strict=False)

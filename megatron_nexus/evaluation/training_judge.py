"""The judge of a model in training: tasks of lm-evaluation-harness, scored by the ranks that train it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.evaluation.harness import NexusLM, judge, require_scoring
from megatron_nexus.evaluation.scores import Request, Score, fit
from megatron_nexus.evaluation.tasks import open_tasks

ScoreTexts = Callable[[Sequence[tuple[Sequence[int], int]]], list[tuple[float, bool]]]
"""Scores the last tokens of texts: token ids, and how many; see `training.scoring`."""


class _TextScorer:
    """A scorer of whole texts as one of continuations."""

    def __init__(self, score_texts: ScoreTexts, seq_length: int) -> None:
        self.seq_length = seq_length
        self._score_texts = score_texts

    def score(self, requests: Sequence[Request]) -> list[Score]:
        fitting = [fit(request, self.seq_length) for request in requests]
        texts = [(r.context + r.continuation, len(r.continuation)) for r in fitting]
        return [Score(log_likelihood, greedy) for log_likelihood, greedy in self._score_texts(texts)]


class TrainingJudge:
    """Asks a model of a run for what its tasks need, again and again; the records are read once."""

    def __init__(
        self, names: Sequence[str], folder: Path | None, limit: int, seq_length: int, tokenizer: Tokenizer
    ) -> None:
        """`folder` None: the published records are fetched. `limit`: items of each task, 0 for all.

        Raises:
            ConfigError, DataError: as `open_tasks`, and where a task has the model generate text.
        """
        self._tasks = open_tasks(names, folder)
        require_scoring(self._tasks)
        self._limit = limit or None
        self._seq_length = seq_length
        self._tokenizer = tokenizer

    def __call__(self, score_texts: ScoreTexts) -> Mapping[str, Mapping[str, float]]:
        """What the model reaches in each task, by metric."""
        model = NexusLM(_TextScorer(score_texts, self._seq_length), self._tokenizer)
        return {name: result.metrics for name, result in judge(model, self._tasks, self._limit).items()}

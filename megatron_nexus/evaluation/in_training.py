"""Evaluation during training: tasks of lm-evaluation-harness, scored by the ranks that train the model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_nexus.data.tokenizer import Tokenizer
from megatron_nexus.evaluation.harness import NexusLM, require_scoring, run_harness
from megatron_nexus.evaluation.tasks import open_tasks
from megatron_nexus.models.scores import Scorer


class InTrainingEvaluator:
    """Tasks whose records are read once and evaluated as often as the run asks."""

    def __init__(self, names: Sequence[str], folder: Path | None, limit: int, tokenizer: Tokenizer) -> None:
        """Open the tasks; `folder` None fetches the published records, `limit` 0 takes all items of a task.

        Raises ConfigError, DataError: as `open_tasks`, and where a task has the model generate text.
        """
        self._tasks = open_tasks(names, folder)
        require_scoring(self._tasks)
        self._limit = limit or None
        self._tokenizer = tokenizer

    def __call__(self, scorer: Scorer) -> Mapping[str, Mapping[str, float]]:
        """Return the metrics of each task, by name."""
        results = run_harness(NexusLM(scorer, self._tokenizer), self._tasks, self._limit)
        return {name: result.metrics for name, result in results.items()}

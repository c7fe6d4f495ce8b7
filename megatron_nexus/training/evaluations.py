"""Evaluations of a run between its steps: losses of validation and test sets, scores of tasks."""

import time
from collections.abc import Sequence
from itertools import product

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.answer_scorer import AnswerScorer
from megatron_nexus.training.corpus import Corpus
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.hooks import Hook
from megatron_nexus.training.metrics import AnswerScores, TaskScores, Validation, make_validation
from megatron_nexus.training.rank_batches import prefetched_batches
from megatron_nexus.training.scoring import DistributedScorer, TaskEvaluator


class Evaluations:
    """Evaluates the engine's model, and hands what it finds to the hooks; all methods are collective."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        engine: Engine,
        corpus: Corpus,
        evaluator: TaskEvaluator | None,
        hooks: Sequence[Hook],
    ) -> None:
        """`evaluator`, on rank 0 where there are tasks, asks for scores."""
        self._config, self._mesh, self._engine, self._corpus = config, mesh, engine, corpus
        self._evaluator, self._hooks = evaluator, hooks
        self._scoring = DistributedScorer(config, mesh, engine) if config.logging.eval_tasks else None
        self._answers = (
            AnswerScorer(config, mesh, engine, corpus.training.samples.width)
            if isinstance(corpus.training, AnswerBatches)
            else None
        )
        self._bytes = {name: corpus.evaluation_bytes(name, config) for name in corpus.evaluations}

    def losses(self, kind: str, step: int) -> list[Validation | AnswerScores]:
        """Return the mean loss over the first global batches of each set of a kind, always the same.

        An unlearning run is validated on the answers that it forgets and retains.
        """
        config = self._config
        accumulation = config.accumulation_steps(self._mesh.world_size)
        made: list[Validation | AnswerScores] = []
        if kind == "validation" and self._answers and isinstance(self._corpus.training, AnswerBatches):
            sets = self._corpus.training.samples.sets
            made = [self._answers.scores(name, step, answers) for name, answers in sets.items()]
            for scores, hook in product(made, self._hooks):
                hook.after_evaluation(scores)
        for name, samples in self._corpus.evaluations.items():
            if name.split()[0] != kind:
                continue
            count = self._corpus.evaluation_batches(name, config)
            with prefetched_batches(config, self._mesh, samples, 0) as batches:
                loss = self._engine.evaluate(batches, count * accumulation)
            targets = count * config.training.global_batch_size * config.training.seq_length
            made.append(make_validation(name, step, loss, targets, self._bytes[name]))
            for hook in self._hooks:
                hook.after_evaluation(made[-1])
        return made

    def task_scores(self, step: int) -> TaskScores | None:
        """Return the scores of --eval-tasks on rank 0."""
        if self._scoring is None:
            return None
        began = time.perf_counter()
        found = self._scoring.run(self._evaluator)
        if self._mesh.rank != 0:
            return None
        scores = TaskScores(step, found, time.perf_counter() - began)
        for hook in self._hooks:
            hook.after_evaluation(scores)
        return scores

"""A model of this package under lm-evaluation-harness; one of the files that import `lm_eval`."""

import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import handle_non_serializable

from megatron_nexus.base.invocation import command
from megatron_nexus.data.tokenizer import Tokenizer, context_id
from megatron_nexus.errors import raise_problems
from megatron_nexus.evaluation.batch_generation import Stop, generate_texts
from megatron_nexus.evaluation.loaded_model import LoadedModel
from megatron_nexus.evaluation.perplexity import windows
from megatron_nexus.evaluation.results import TaskResult
from megatron_nexus.evaluation.sampling import Sampling
from megatron_nexus.evaluation.tasks import Tasks, open_tasks
from megatron_nexus.models.scores import Request, Scorer

BOOTSTRAPS = 1000
"""Bootstrap iterations for metrics whose standard error has no formula; accuracy has one."""

TokenizedPair = tuple[tuple[str, str], list[int], list[int]]


class NexusLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Answers the three questions of the harness: how likely is a continuation, a text; what comes next."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, loaded: LoadedModel | None = None) -> None:
        """Wrap `scorer`; tasks that generate text need the loaded model too."""
        super().__init__()
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._loaded = loaded
        self.asked = self.cut = 0
        """Continuations that were scored; those of which the model has not seen the beginning."""

    @property
    def eot_token_id(self) -> int:
        """What stands between documents."""
        return self._tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or the end of the document before."""
        return context_id(self._tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None
    ) -> list[int]:
        """Return token ids that begin as the documents of the training data do."""
        ids = self._tokenizer.encode(string)
        if add_special_tokens is None or add_special_tokens:
            ids = [*self._tokenizer.document_prefix, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenizedPair], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        longest = self._scorer.seq_length + 1  # the last token is predicted, not read
        self.asked += len(asked)
        self.cut += sum(len(one.context) + len(one.continuation) > longest for one in asked)
        return [(score.log_likelihood, score.greedy) for score in self._scorer.score(asked)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text, in windows of the model's length."""
        length = self._scorer.seq_length
        asked = [
            windows(self.tok_encode(request.args[0]), self.prefix_token_id, length, length)
            for request in requests
        ]
        scores = iter(self._scorer.score([window for of_text in asked for window in of_text]))
        return [sum(next(scores).log_likelihood for _ in of_text) for of_text in asked]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the text that is generated after each prompt, under its own settings."""
        assert self._loaded is not None, "require_scoring lets no such task through"
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for numbers in by_settings.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1])
            sampling = Sampling(
                float(settings["temperature"]) if settings["do_sample"] else 0.0,
                int(settings.get("top_k", 0)),
                float(settings.get("top_p", 1.0)),
            )
            stop = Stop(tuple(settings["until"]), int(settings["max_gen_toks"]))
            prompts = [requests[number].args[0] for number in numbers]
            made = generate_texts(self._loaded, self._tokenizer, prompts, sampling, stop)
            texts |= dict(zip(numbers, made, strict=True))
        return [texts[number] for number in range(len(requests))]


def require_scoring(tasks: Tasks) -> None:
    """Raise ConfigError where a task wants text generated, which a model in training does not do."""
    wrong = [
        f"the task {name} has the model generate text, which --eval-tasks does not: evaluate a "
        f"checkpoint with {command('evaluate')} instead"
        for name, task in tasks.items()
        if task.OUTPUT_TYPE == "generate_until"
    ]
    raise_problems(wrong)


def make_evaluator(
    names: Sequence[str], folder: Path | None, limit: int, tokenizer: Tokenizer
) -> Callable[[Scorer], Mapping[str, Mapping[str, float]]]:
    """Return what scores tasks, whose records are read now, by the ranks that train a model.

    `folder` None fetches the published records, `limit` 0 takes all items of a task.

    Raises ConfigError, DataError: as `open_tasks`, and where a task has the model generate text.
    """
    tasks = open_tasks(names, folder)
    require_scoring(tasks)

    def evaluate(scorer: Scorer) -> Mapping[str, Mapping[str, float]]:
        results = run_harness(NexusLM(scorer, tokenizer), tasks, limit or None)
        return {name: result.metrics for name, result in results.items()}

    return evaluate


def run_harness(
    model: NexusLM,
    tasks: Tasks,
    limit: int | None = None,
    samples: dict[str, list[dict[str, Any]]] | None = None,
) -> dict[str, TaskResult]:
    """Return the result of each task over its first `limit` items. Does not touch global random state.

    `samples`, where it is given, gets what the harness records of each item, by task.
    """
    # Its bars would stand in the way of ours.
    with contextlib.redirect_stderr(io.StringIO()):
        results = lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": dict(tasks)},
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=samples is not None,
        )
    if samples is not None:
        samples |= results["samples"]
    counts = results["n-samples"]
    return {
        name: TaskResult(
            int(counts[name]["effective"]),
            _named_numbers(of_task, errors=False),
            _named_numbers(of_task, errors=True),
        )
        for name, of_task in results["results"].items()
        if name in tasks
    }


def sample_lines(of_task: Sequence[Mapping[str, Any]]) -> str:
    """Return what the harness records of the items of a task as JSON lines, as --log-samples asks."""
    return "".join(
        json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n" for sample in of_task
    )


def _named_numbers(of_task: Mapping[str, object], errors: bool) -> dict[str, float]:
    """Return the metrics of a task, or their standard errors, by metric.

    The harness writes both as "metric,filter" and "metric_stderr,filter", the usual filter being "none".
    """
    found = {}
    for key, value in of_task.items():
        metric, comma, chain = key.partition(",")
        name = metric.removesuffix("_stderr")
        if comma and isinstance(value, float | int) and errors == (name != metric):
            found[name if chain == "none" else f"{name} ({chain})"] = float(value)
    return found

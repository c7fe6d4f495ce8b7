"""The verb `evaluate`: scores of a trained model on tasks and held-out texts.

nexus evaluate --load runs/x --tasks piqa,openbookqa,hellaswag,arc_easy,arc_challenge
nexus evaluate --load runs/x --perplexity held_out.txt
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_nexus import log
from megatron_nexus.cli.arguments import count, output_problems, positive, read_text
from megatron_nexus.cli.model_arguments import TrainedModel, add_model_arguments, find_model
from megatron_nexus.config.files_config import split_names
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.errors import ConfigError, DataError, os_errors_as, raise_problems, try_all
from megatron_nexus.evaluation.task_files import PAPER_TASKS, require_tasks
from megatron_nexus.spec.cost import parameter_count

if TYPE_CHECKING:
    from megatron_nexus.evaluation.perplexity import Perplexity
    from megatron_nexus.evaluation.results import TaskResult


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "evaluate",
        "--load RUN --tasks NAMES | --perplexity FILE... [flags]",
        description="Evaluate a trained model on tasks of lm-evaluation-harness and on held-out texts.",
    )
    add_model_arguments(parser)
    flag = parser.add_flag
    text = f"tasks of lm-evaluation-harness, with commas between them, such as {','.join(PAPER_TASKS)}"
    flag("--tasks", text, type=split_names, default=(), metavar="NAMES")
    text = "read the tasks' records from its files, such as piqa.jsonl (default: fetch the published ones)"
    flag("--task-path", text, type=Path, metavar="FOLDER")
    text = "folders of task files of your own (YAML of lm-evaluation-harness), for --tasks"
    flag("--include-path", text, type=Path, nargs="+", default=[], metavar="FOLDER")
    text = "examples before each question (default: as the task's configuration says, else none)"
    flag("--num-fewshot", text, type=count, metavar="N")
    flag("--limit", "items of each task (default: all)", type=positive(int))
    text = "write prompt, answers and scores of each item next to --output, a file for each task"
    flag("--log-samples", text, action="store_true")
    text = "samples of the model's length in a forward pass (default: as many as have 4,096 tokens)"
    flag("--batch-size", text, type=positive(int), metavar="N")
    text = "held-out texts, each a document: perplexity per token, word and byte"
    flag("--perplexity", text, type=Path, nargs="+", default=[], metavar="FILE")
    text = "tokens that each window predicts (default: a whole sample; fewer see more context, cost more)"
    flag("--perplexity-stride", text, type=positive(int), default=0)
    flag("--output", "write the results there as JSON, too", type=Path, metavar="FILE")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus evaluate` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    texts, trained = try_all(lambda: _look_ahead(given), lambda: find_model(given))
    # Data that cannot be fetched is an error before a model is loaded.
    tasks = None
    if given.tasks:
        with log.importing("lm-evaluation-harness"):
            from megatron_nexus.evaluation.tasks import open_tasks
        tasks = open_tasks(given.tasks, given.task_path, given.include_path, given.num_fewshot)
    loaded = trained.load()
    from megatron_nexus.evaluation.local_scorer import TOKENS_PER_PASS, LocalScorer
    from megatron_nexus.evaluation.perplexity import measure_perplexity
    from megatron_nexus.evaluation.results import task_table

    per_pass = given.batch_size * loaded.seq_length if given.batch_size else TOKENS_PER_PASS
    scorer = LocalScorer(loaded, per_pass)
    results: Mapping[str, TaskResult] = {}
    if tasks is not None:
        from megatron_nexus.evaluation.harness import NexusLM, run_harness, sample_lines

        model = NexusLM(scorer, trained.tokenizer, loaded)
        samples: dict[str, list[dict[str, Any]]] = {}
        results = run_harness(model, tasks, given.limit, samples if given.log_samples else None)
        log.show(task_table(results))
        if model.cut:
            log.logger.info(
                "note: %d of %d continuations with their prompts are longer than the %d tokens of the model, "
                "which has not seen their beginning: fewer examples (--num-fewshot) fit",
                *(model.cut, model.asked, loaded.seq_length),
            )
        for name, of_task in samples.items():
            # scores_samples_piqa.jsonl next to scores.json
            file = f"{given.output.stem}_samples_{name.replace(os.sep, '_')}.jsonl"
            _write(given.output.with_name(file), sample_lines(of_task))
    perplexities = {}
    for path, text in texts.items():
        perplexities[path] = measure_perplexity(scorer, trained.tokenizer, text, given.perplexity_stride)
        log.logger.info("%s: %s", path, perplexities[path])
    if given.output is not None:
        record = _record(trained, str(loaded.device), results, perplexities)
        _write(given.output, json.dumps(record, indent=2) + "\n")


def _write(path: Path, contents: str) -> None:
    with os_errors_as(DataError, f"--output {path}", "the results stand above; give another file"):
        path.write_text(contents, encoding="utf-8")
    log.logger.info("wrote %s", path)


def _look_ahead(given: argparse.Namespace) -> dict[Path, str]:
    """Read the texts and look at all that can be wrong before a model is loaded. Raises NexusError."""
    if not given.tasks and not given.perplexity:
        raise ConfigError("nothing to evaluate: give --tasks, --perplexity, or both")
    _check_flags(given)
    if given.tasks:
        require_tasks(given.tasks, given.task_path)
    texts = try_all(*(partial(read_text, "--perplexity", path) for path in given.perplexity))
    return dict(zip(given.perplexity, texts, strict=True))


def _check_flags(given: argparse.Namespace) -> None:
    """Raise ConfigError where a flag of tasks has none or lacks another, or --output cannot be written."""
    problems = []
    if not given.tasks:
        flags = {
            f"--task-path {given.task_path}": given.task_path is not None,
            f"--include-path {' '.join(map(str, given.include_path))}": bool(given.include_path),
            f"--num-fewshot {given.num_fewshot}": given.num_fewshot is not None,
            "--log-samples": given.log_samples,
        }
        problems += [f"{flag} belongs to --tasks: give both, or neither" for flag in flags if flags[flag]]
    if given.task_path is not None and given.include_path:
        problems.append(
            f"--task-path {given.task_path} reads the paper's tasks, --include-path your own: evaluate them "
            "one after the other"
        )
    if given.log_samples and given.output is None:
        problems.append("--log-samples writes next to --output, and there is none: add --output scores.json")
    problems += output_problems("--output", given.output)
    problems += [
        f"--include-path {folder} is not a folder: give one that holds task files (YAML)"
        for folder in given.include_path
        if not folder.is_dir()
    ]
    raise_problems(problems)


def _record(
    trained: TrainedModel,
    device: str,
    results: "Mapping[str, TaskResult]",
    perplexities: "Mapping[Path, Perplexity]",
) -> dict[str, object]:
    return {
        "checkpoint": str(trained.checkpoint),
        "preset": trained.config.preset,
        "parameters": parameter_count(trained.manifest.specs.values()),
        "step": trained.manifest.progress.step,
        "tokens": trained.manifest.progress.tokens,
        "precision": trained.precision,
        "device": device,
        "tasks": {name: dataclasses.asdict(result) for name, result in results.items()},
        "perplexity": {str(path): found.record for path, found in perplexities.items()},
    }

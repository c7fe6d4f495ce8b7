"""The verb `evaluate`: scores of a trained model on tasks and held-out texts.

nexus evaluate --load runs/x --tasks piqa,openbookqa,hellaswag,arc_easy,arc_challenge
nexus evaluate --load runs/x --perplexity held_out.txt
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_nexus import log
from megatron_nexus.cli.arguments import positive
from megatron_nexus.cli.model_arguments import TrainedModel, add_model_arguments, find_model
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.errors import ConfigError, DataError
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
    parser.add_argument(
        "--tasks",
        type=_names,
        default=(),
        metavar="NAMES",
        help=f"tasks of lm-evaluation-harness, with commas between them, such as {','.join(PAPER_TASKS)}",
    )
    parser.add_argument(
        "--task-path",
        type=Path,
        metavar="FOLDER",
        help="read the tasks' records from its files, such as piqa.jsonl (default: fetch the published ones)",
    )
    parser.add_argument("--limit", type=positive(int), help="items of each task (default: all)")
    parser.add_argument(
        "--perplexity",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="held-out texts, each a document: perplexity per token, word and byte",
    )
    parser.add_argument(
        "--perplexity-stride",
        type=positive(int),
        default=0,
        help="tokens that each window predicts (default: a whole sample; fewer see more context, cost more)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there as JSON, too")
    return parser


def _names(text: str) -> tuple[str, ...]:
    """Return the names between commas, each once."""
    return tuple(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))


def run(argv: list[str]) -> None:
    """Run `nexus evaluate` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    texts = _look_ahead(given)
    trained = find_model(given)
    # Data that cannot be fetched is an error before a model is loaded.
    tasks = None
    if given.tasks:
        with log.importing("lm-evaluation-harness"):
            from megatron_nexus.evaluation.tasks import open_tasks
        tasks = open_tasks(given.tasks, given.task_path)
    loaded = trained.load()
    from megatron_nexus.evaluation.local_scorer import LocalScorer
    from megatron_nexus.evaluation.perplexity import measure_perplexity
    from megatron_nexus.evaluation.results import perplexity_line, task_table

    scorer = LocalScorer(loaded)
    results: Mapping[str, TaskResult] = {}
    if tasks is not None:
        from megatron_nexus.evaluation.harness import NexusLM, run_harness

        results = run_harness(NexusLM(scorer, trained.tokenizer, loaded), tasks, given.limit)
        for line in task_table(results):
            log.logger.info("%s", line)
    perplexities = {}
    for path, text in texts.items():
        perplexities[path] = measure_perplexity(scorer, trained.tokenizer, text, given.perplexity_stride)
        log.logger.info("%s: %s", path, perplexity_line(perplexities[path]))
    if given.output is not None:
        record = _record(trained, str(loaded.device), results, perplexities)
        try:
            given.output.write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            raise DataError(
                f"--output {given.output}: {error.strerror}: the results stand above; give another file"
            ) from error
        log.logger.info("wrote %s", given.output)


def _look_ahead(given: argparse.Namespace) -> dict[Path, str]:
    """Read the texts and look at all that can be wrong before a model is loaded.

    Raises ConfigError or DataError.
    """
    if not given.tasks and not given.perplexity:
        raise ConfigError("nothing to evaluate: give --tasks, --perplexity, or both")
    if given.task_path is not None and not given.tasks:
        raise ConfigError(f"--task-path {given.task_path} belongs to --tasks: give both, or neither")
    if given.output is not None:
        _require_writable(given.output)
    if given.tasks:
        require_tasks(given.tasks, given.task_path)
    texts = {}
    for path in given.perplexity:
        try:
            texts[path] = path.read_bytes().decode()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}: give a text file that can be read") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error}): convert it, or give another") from error
        if not texts[path]:
            raise DataError(f"{path} is empty, and perplexity is of a text: give a file with text")
    return texts


def _require_writable(output: Path) -> None:
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder does not exist: make it, or give another")
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder: add a name, such as scores.json")
    if not os.access(output.resolve().parent, os.W_OK):
        raise ConfigError(f"--output {output}: its folder cannot be written to: give another")


def _record(
    trained: TrainedModel,
    device: str,
    results: "Mapping[str, TaskResult]",
    perplexities: "Mapping[Path, Perplexity]",
) -> dict[str, object]:
    """Return all results, and what they were measured on, for JSON."""
    from megatron_nexus.evaluation.results import perplexity_record

    return {
        "checkpoint": str(trained.checkpoint),
        "preset": trained.config.preset,
        "parameters": parameter_count(trained.manifest.specs.values()),
        "step": trained.manifest.progress.step,
        "tokens": trained.manifest.progress.tokens,
        "precision": trained.precision,
        "device": device,
        "tasks": {name: dataclasses.asdict(result) for name, result in results.items()},
        "perplexity": {str(path): perplexity_record(found) for path, found in perplexities.items()},
    }

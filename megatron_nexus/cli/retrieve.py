"""The verb `retrieve`: choose what an unlearning run forgets and retains, from a few undesired outputs.

    nexus retrieve --load runs/a --corpus data/train --queries q.jsonl --forget 64 --retain 64 --output found
    nexus unlearn --load runs/a --forget found/forget.jsonl --retain found/retain.jsonl ...

Samples are compared with the queries by the cosine of their gradients (RASLIK, arXiv 2604.16591).
"""

import argparse
import dataclasses
import hashlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_nexus import log
from megatron_nexus.analysis.sketch_store import SketchRecord, SketchStore, check_record
from megatron_nexus.base.durable import dir_lock
from megatron_nexus.base.imports import gc_paused
from megatron_nexus.base.invocation import command, program_words
from megatron_nexus.checkpoint.manifest import INDEX_FILE, MANIFEST_FILE
from megatron_nexus.cli.arguments import count, output_problems, positive
from megatron_nexus.cli.model_arguments import TrainedModel, add_checkpoint_arguments, find_model
from megatron_nexus.cli.rank_process import end_refused_rank, run_rank
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.rules import check_topology
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answer_sources import AnswerSource, open_answer_source, require_corpus
from megatron_nexus.data.answers import Answer, AnswerTokens, read_answers, tokenize_answers
from megatron_nexus.errors import ConfigError, NexusError, path_errors, raise_problems, try_all
from megatron_nexus.parallel.launcher_watch import stop_without_launcher
from megatron_nexus.parallel.local_ranks import missing_ranks, run_local_ranks
from megatron_nexus.parallel.world import World, read_world
from megatron_nexus.spec.cost import parameter_count

if TYPE_CHECKING:
    from megatron_nexus.analysis.sketch_search import Scores
    from megatron_nexus.parallel.mesh import Mesh

DEFAULT_NUMBERS, MOST_NUMBERS = 8192, 1 << 30
"""Size of a sketch."""


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser(
        "retrieve",
        "--load RUN --corpus PATH... --queries FILE --forget N --retain N [flags]",
        description=(
            "Choose the samples of a corpus that an unlearning run is to forget, those whose gradients point "
            "as the gradients of some undesired outputs do, and those to retain, whose gradients point the "
            "other way."
        ),
    )
    add_checkpoint_arguments(parser)
    flag = parser.add_flag
    text = ".jsonl files, a sample a line, or the prefix of a .bin/.idx pair, whose documents are the samples"
    flag("--corpus", text, required=True, nargs="+", metavar="PATH")
    text = 'undesired outputs, a line each: {"prompt": ..., "answer": ...} or {"text": ...}'
    flag("--queries", text, required=True, type=Path, metavar="FILE")
    for side in ("forget", "retain"):
        flag(f"--{side}", f"samples to {side}, at most", required=True, type=positive(int), metavar="N")
    text = "where forget.jsonl, retain.jsonl and report.json are written (default: retrieved)"
    flag("--output", text, default=Path("retrieved"), type=Path, metavar="FOLDER")
    text = "K, numbers of a sketch; 0: whole gradients, of a small model (default: 8192)"
    flag("--sketch-size", text, type=count, default=DEFAULT_NUMBERS, metavar="K")
    text = "keep the sketches of the corpus there: a search goes on from them, and other queries reuse them"
    flag("--save-sketches", text, type=Path, metavar="FOLDER")
    text = "the first N; those whose score is --threshold or more; the first N, the last of them by chance"
    choices = ("top", "threshold", "sample")
    flag("--select", f"{text} (default: top)", choices=choices, default="top")
    text = "least score of --select threshold, and of minus that of a sample to retain"
    flag("--threshold", text, type=float, metavar="COSINE")
    text = "order samples by their mean cosine with the queries, or by their mean rank (default: score)"
    flag("--combine", text, choices=("score", "rank"), default="score")
    text = "retain samples of opposed gradients, or any that are not to be forgotten (default: antipode)"
    flag("--retain-from", text, choices=("antipode", "random"), default="antipode")
    text = "samples that are almost a query may be chosen, too"
    flag("--keep-near-duplicates", text, action="store_true")
    text = "divide gradients by sqrt(v) + eps of the checkpoint's Adam (default: none)"
    flag("--preconditioner", text, choices=("none", "adam"), default="none")
    text = "of gradients: as a whole, or each tensor's by its own norm (default: whole)"
    flag("--normalise", text, choices=("whole", "tensor"), default="whole")
    text = "of weights and activations (default: fp32)"
    flag("--precision", text, choices=("fp32", "bf16"), default="fp32")
    text = "ranks that share each layer (default: 1)"
    flag("--tp --tensor-model-parallel-size", text, type=positive(int), default=1, metavar="N")
    text = "pipeline stages (default: 1)"
    flag("--pp --pipeline-model-parallel-size", text, type=positive(int), default=1, metavar="N")
    flag("--seed", "of sketches, and of what chance decides (default: 1234)", type=count, default=1234)
    parser.set_defaults(device=None)
    return parser


@dataclass(frozen=True)
class _Search:
    """What a command line asks for."""

    given: argparse.Namespace
    trained: TrainedModel
    config: RunConfig
    queries: Sequence[Answer]
    query_tokens: Sequence[AnswerTokens]


def run(argv: list[str], verb: str = "retrieve") -> NoReturn:
    """Run `nexus retrieve` with the flags `argv` and end the process."""
    world = None
    try:
        world = read_world(os.environ)
        log.configure(is_main_rank=world.rank == 0)
        with path_errors():
            search = _look_ahead(make_parser().parse_args(argv), world)
            needed = search.given.tp * search.given.pp
            if missing_ranks(world, needed):
                log.logger.info(
                    "launched as one process on a CPU-only machine; spawning %d local ranks", needed
                )
                sys.exit(run_local_ranks(needed, [*program_words(verb), *argv]))
            if world.launcher != "local":
                stop_without_launcher(signal.SIGTERM)
            source = _open_corpus(search)
    except NexusError as error:
        end_refused_rank(error, world)
    with log.Progress("importing torch"), gc_paused():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from megatron_nexus.parallel.mesh import close_mesh, make_mesh

    def task() -> None:
        mesh = make_mesh(world, search.given.tp, search.given.pp)
        _retrieve(search, source, mesh)
        mesh.control.barrier()
        close_mesh()

    run_rank(task, world)


def _look_ahead(given: argparse.Namespace, world: World) -> _Search:
    """Check what can be wrong before ranks are started. Raises ConfigError, DataError, CheckpointError."""
    problems = []
    if given.sketch_size > MOST_NUMBERS:
        problems.append(f"--sketch-size {given.sketch_size:,} must be at most {MOST_NUMBERS:,}: give less")
    if (given.select == "threshold") != (given.threshold is not None):
        problems.append("--select threshold and --threshold COSINE belong together: give both, or neither")
    if given.threshold is not None and not -1.0 <= given.threshold <= 1.0:
        problems.append(f"--threshold {given.threshold} is no cosine: give one from -1 to 1, such as 0.2")
    problems += output_problems("--output", given.output, is_folder=True)
    problems += output_problems("--save-sketches", given.save_sketches, is_folder=True)
    raise_problems(problems)
    trained, queries, _ = try_all(
        lambda: find_model(given), lambda: _read_queries(given.queries), lambda: require_corpus(given.corpus)
    )
    whole = parameter_count(trained.manifest.specs.values())
    if given.sketch_size > max(whole, DEFAULT_NUMBERS):
        raise ConfigError(
            f"--sketch-size {given.sketch_size:,} is more than the {whole:,} parameters of the model: give "
            "less, or 0 for exact gradients"
        )
    parallel = dataclasses.replace(
        trained.config.parallel,
        tensor_model_parallel_size=given.tp,
        pipeline_model_parallel_size=given.pp,
        zero_stage=1,
        sequence_parallel=False,
    )
    config = dataclasses.replace(trained.config, parallel=parallel)
    needed = given.tp * given.pp
    check_topology(config, needed if missing_ranks(world, needed) else world.size)
    tokens, cut = tokenize_answers(queries, trained.tokenizer, config.training.seq_length)
    if cut:
        length = config.training.seq_length
        log.logger.info("of %d of %d queries what exceeds %d tokens is cut off", cut, len(queries), length)
    return _Search(given, trained, config, queries, tokens)


def _read_queries(path: Path) -> list[Answer]:
    if path.is_dir():
        raise ConfigError(f"--queries {path} is not a file: give a .jsonl file of undesired outputs")
    return read_answers(path)


def _open_corpus(search: _Search) -> AnswerSource:
    """Open the corpus and compare the sketches that are kept with it. Raises ConfigError, DataError."""
    given, config = search.given, search.config
    source = open_answer_source(
        given.corpus, search.trained.tokenizer, config.training.seq_length, config.model.vocab_size
    )
    if given.forget + given.retain > len(source):
        raise ConfigError(
            f"--forget {given.forget:,} and --retain {given.retain:,} are more than the {len(source):,} "
            "samples of the corpus: give less, or a larger corpus"
        )
    if given.save_sketches is not None:
        check_record(given.save_sketches, _record(search, source))
    return source


def _retrieve(search: _Search, source: AnswerSource, mesh: "Mesh") -> None:
    """Score the corpus and write what is chosen; a collective call."""
    from megatron_nexus.analysis.sample_gradients import SampleGradients
    from megatron_nexus.analysis.sketch_search import score_corpus, sketch_queries
    from megatron_nexus.checkpoint.store import CheckpointReader
    from megatron_nexus.models.layer_context import DTYPES
    from megatron_nexus.training.machine import set_num_threads, tune_malloc

    given = search.given
    set_num_threads(mesh)
    if mesh.device.type == "cpu":
        tune_malloc()
    if source.cut:
        length = search.config.training.seq_length
        log.logger.info("of %s samples what exceeds %d tokens is cut off", f"{source.cut:,}", length)
    with log.Progress(f"loading {search.trained.checkpoint}"):
        model = SampleGradients(
            CheckpointReader(search.trained.checkpoint),
            search.config,
            mesh,
            DTYPES[given.precision],
            given.sketch_size,
            given.seed,
            per_tensor=given.normalise == "tensor",
            by_adam=given.preconditioner == "adam",
        )
    kept = given.save_sketches if mesh.rank == 0 else None
    try:
        with dir_lock(kept) if kept else nullcontext():
            store = SketchStore(kept, _record(search, source), model.sketch_size) if kept else None
            queries_QK = sketch_queries(model, search.query_tokens, given.combine)
            scores_NQ = score_corpus(model, source, queries_QK, store, mesh)
    except BlockingIOError:
        raise ConfigError(
            f"--save-sketches {kept}: another search writes there: wait for it, or give another folder"
        ) from None
    if mesh.rank == 0:
        _write(search, source, scores_NQ, model.sketch_size)


def _record(search: _Search, source: AnswerSource) -> SketchRecord:
    """Return what decides the sketches of the corpus."""
    given, checkpoint = search.given, search.trained.checkpoint
    digest = hashlib.sha256()
    for name in (MANIFEST_FILE, INDEX_FILE):
        with suppress(FileNotFoundError):  # an index for each rank, in checkpoints of format 2
            digest.update((checkpoint / name).read_bytes())
    return SketchRecord(
        checkpoint=digest.hexdigest(),
        corpus=source.fingerprint,
        samples=len(source),
        sketch_size=given.sketch_size,
        seed=given.seed,
        normalise=given.normalise,
        preconditioner=given.preconditioner,
        precision=given.precision,
    )


def _write(search: _Search, source: AnswerSource, scores_NQ: "Scores", numbers: int) -> None:
    from megatron_nexus.analysis.retrieval_report import (
        FORGET_FILE,
        RETAIN_FILE,
        make_report,
        report_lines,
        write_results,
    )
    from megatron_nexus.analysis.selection import SelectionRule, choose, mean_scores, ordered
    from megatron_nexus.analysis.text_overlap import NearDuplicates

    given = search.given
    rule = SelectionRule(
        given.forget,
        given.retain,
        given.select,
        given.threshold or 0.0,
        numbers**-0.5 if given.sketch_size else 0.0,
        given.retain_from,
        given.seed,
    )
    duplicates = NearDuplicates(search.queries)

    def is_left_out(number: int) -> bool:
        answer = source.answer(number)
        return not answer.answer or (not given.keep_near_duplicates and duplicates.has(answer))

    scores, order = mean_scores(scores_NQ), ordered(scores_NQ, given.combine)
    selection = choose(order, scores, rule, is_left_out)
    report = make_report(source, search.queries, scores, selection, rule, given.sketch_size)
    given.output.mkdir(parents=True, exist_ok=True)
    write_results(given.output, source, order, scores, selection, report)
    log.show(report_lines(report))
    log.logger.info("wrote %s, %s", given.output / FORGET_FILE, given.output / RETAIN_FILE)
    if not (selection.forget and selection.retain):
        return
    log.logger.info(
        "next: %s --load %s --save FOLDER --forget %s --retain %s --lr 1e-5 --train-iters 50",
        command("unlearn"),
        given.load,
        given.output / FORGET_FILE,
        given.output / RETAIN_FILE,
    )

"""Scores of answers by the ranks that train, at any topology: likelihoods, what is memorised, logits.

The metrics are those of open-unlearning (arXiv 2506.12618): the probability of an answer is exp of its mean
log-probability; exact memorization is the share of its tokens that are the argmax after what stands before
them; extraction strength is the share of its end that greedy decoding gives, after the rest.

N answers, B rows, T tokens, V the part of the vocabulary on this rank.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megatron_nexus.base.communicator import raise_on_all_ranks
from megatron_nexus.base.json_text import parse_json, record_of
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.answers import AnswerTokens
from megatron_nexus.data.unlearning_samples import FORGET, RETAIN, UnlearningSamples
from megatron_nexus.log import Progress
from megatron_nexus.parallel.mesh import Mesh
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.engine import Engine
from megatron_nexus.training.metrics import AnswerScores
from megatron_nexus.training.reference import LogitsFile, ReferenceFolder
from megatron_nexus.training.scoring import numbered_outputs, passes_at_once
from megatron_nexus.training.stage_module import Output


class AnswerScorer:
    """The engine's model as it is at each call; all methods are collective."""

    def __init__(self, config: RunConfig, mesh: Mesh, engine: Engine, width: int) -> None:
        """`width`: tokens to which samples are padded."""
        self._mesh, self._engine = mesh, engine
        self._rows, self._width = config.training.micro_batch_size, width

    def scores(self, name: str, step: int, answers: Sequence[AnswerTokens]) -> AnswerScores:
        """Return the means over a set's answers, each of which counts alike."""
        log_p_N, length_N, exact_N, extracted_N = self._each(answers).unbind(dim=1)
        nll_N = -log_p_N / length_N
        means = (float(x_N.mean()) for x_N in (nll_N, (-nll_N).exp(), exact_N, extracted_N))
        return AnswerScores(name, step, *means)

    def log_p(self, answers: Sequence[AnswerTokens]) -> list[float]:
        """Return the log-probability of each answer."""
        return self._each(answers)[:, 0].tolist()

    def _each(self, answers: Sequence[AnswerTokens]) -> Tensor:
        """Return log-probability, tokens, exact memorization and extraction strength, float64 [N, 4]."""
        found_N4 = torch.zeros(len(answers), 4, dtype=torch.float64)
        output, passes = self._engine.logits_loss.token_scores, passes_at_once(self._mesh)
        for number, score_2T in self._outputs(answers, output, passes):
            # Tensor-parallel ranks have the same scores: the first of them adds its own.
            if self._mesh.tp_rank == 0:
                found_N4[number] = _numbers_of(score_2T.double().cpu(), answers[number])
        self._mesh.control.all_reduce(found_N4)
        return found_N4

    def _outputs(
        self, answers: Sequence[AnswerTokens], output: Output, passes: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield, on the last stage, this rank's answers by number and what `output` makes of each."""
        span = self._rows * passes * self._mesh.dp_size
        for begin in range(0, len(answers), span):
            samples = dict(enumerate(answers[begin : begin + span], begin))
            yield from numbered_outputs(
                self._engine, self._mesh, samples, self._rows, self._width, passes, output
            )

    def make_reference(
        self, samples: UnlearningSamples, loss: str, retain_loss: str, folder: ReferenceFolder
    ) -> None:
        """Write what the losses need of the model as it is now. Raises CheckpointError."""
        mesh, written = self._mesh, ""
        with raise_on_all_ranks(mesh.control, "cannot keep the reference model's numbers"):
            if mesh.rank == 0:
                folder.begin()
        log_p = self.log_p(samples.sets[FORGET]) if loss == "npo" else []
        if retain_loss == "klr":
            written = self._write_logits(samples.sets[RETAIN], folder)
        with raise_on_all_ranks(mesh.control, "cannot keep the reference model's numbers"):
            records = [record for record in mesh.control.all_gather_str(written) if record]
            if mesh.rank == 0:
                folder.finish(log_p, [record_of(LogitsFile, parse_json(record)) for record in records])

    def _write_logits(self, answers: Sequence[AnswerTokens], folder: ReferenceFolder) -> str:
        """Write the logits of this rank's answers and columns; return its record as JSON, "" without any."""
        mesh, engine = self._mesh, self._engine
        span = self._rows * mesh.dp_size
        mine = [n for n in range(len(answers)) if n % span // self._rows == mesh.dp_rank]
        columns = engine.logits_loss.vocabulary_range
        lengths = [len(answers[n].ids) - answers[n].answer_start for n in mine]
        record = LogitsFile(f"logits_{mesh.rank}.npy", tuple(mine), tuple(lengths), columns)
        writes = bool(mine) and mesh.is_last_stage and columns[1] > columns[0]
        cannot = "cannot keep the reference model's logits"
        # Outside of the forward passes, in which other ranks would wait for one that has failed.
        with raise_on_all_ranks(mesh.control, cannot):
            rows = folder.open_logits(record) if writes else None
        first = 0
        for number, logits_TV in self._outputs(answers, lambda logits_TBV, _: logits_TBV.float(), passes=1):
            start = answers[number].answer_start - 1
            count = len(answers[number].labels) - start
            if rows is not None:
                found = logits_TV[start : start + count, : columns[1] - columns[0]]
                rows[first : first + count] = found.cpu().numpy()
                first += count
        with raise_on_all_ranks(mesh.control, cannot):
            if rows is not None:
                record = folder.close_logits(record, rows)
        return json.dumps(asdict(record)) if writes else ""


def _numbers_of(score_2T: Tensor, answer: AnswerTokens) -> Tensor:
    """Return log-probability, tokens, exact memorization and extraction strength of one answer."""
    ends_2K = score_2T[:, answer.answer_start - 1 : len(answer.labels)]
    count = ends_2K.shape[1]
    wrong = (ends_2K[1] == 0).nonzero()[:, 0]
    extracted = count - 1 - int(wrong[-1]) if len(wrong) else count
    return torch.tensor(
        [float(ends_2K[0].sum()), count, float(ends_2K[1].mean()), extracted / count], dtype=torch.float64
    )


def open_reference(
    config: RunConfig, mesh: Mesh, engine: Engine, batches: AnswerBatches, run_dir: Path, begins: bool
) -> None:
    """Give the batches of a run the numbers of its reference model, made now if it `begins`.

    A collective call. Raises CheckpointError.
    """
    losses = config.unlearning
    if losses.loss != "npo" and losses.retain_loss != "klr":
        return
    folder = ReferenceFolder(run_dir, batches.samples.fingerprint)
    if begins:
        with Progress("computing the reference model's numbers"):
            scorer = AnswerScorer(config, mesh, engine, batches.samples.width)
            scorer.make_reference(batches.samples, losses.loss, losses.retain_loss, folder)
    with raise_on_all_ranks(mesh.control, "cannot read the reference model's numbers"):
        # Other stages of a pipeline have no loss: they need not hold a [T, B, V] for each micro-batch.
        width = engine.logits_loss.vocabulary_width if mesh.is_last_stage else 0
        verifies = mesh.rank == 0 and not begins
        batches.reference = folder.read(engine.logits_loss.vocabulary_range, width, verifies)

"""A cell: one unlearning run in this process, with the losses, samples and optimizer of `nexus unlearn`.

The command itself needs ten seconds to start; a cell takes one. `study.py --check` shows on two cells that
both give the same losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from corpora import Corpus
from models import SEQ_LENGTH, LoadedBase
from selections import Selection

from megatron_nexus.config.run_config import OptimizerConfig, RunConfig
from megatron_nexus.config.unlearning_config import UnlearningConfig
from megatron_nexus.data.answers import AnswerTokens
from megatron_nexus.data.loader import answer_batch
from megatron_nexus.data.unlearning_samples import FORGET, RETAIN, UnlearningSamples
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.optimizer import make_optimizer
from megatron_nexus.training.reference import LogitsFile, Reference
from megatron_nexus.training.unlearning_loss import UnlearningLoss

LOSSES = {
    "GA": "--loss ga --retain-loss none",
    "GA, GDR": "--loss ga --retain-loss gdr",
    "GA, KLR": "--loss ga --retain-loss klr",
    "NPO, GDR": "--loss npo --retain-loss gdr",
    "SimNPO, GDR": "--loss simnpo --retain-loss gdr",
}
BETAS = {
    **{f"NPO {beta}, GDR": f"--loss npo --retain-loss gdr --npo-beta {beta}" for beta in (0.03, 0.1, 0.3, 1)},
    **{
        f"SimNPO {beta}, GDR": f"--loss simnpo --retain-loss gdr --simnpo-beta {beta}"
        for beta in (0.15, 0.5, 1.5, 4.5)
    },
}
"""Losses of `study.py --betas`: how far areas depend on the inverse temperatures."""
SIDE = 8
"""Samples of each set in a step."""


@dataclass(frozen=True)
class Cell:
    """What one run is."""

    seed: int
    task: str
    selection: str
    loss: str
    lr: float

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from all others."""
        return (self.seed, self.task, self.selection, self.loss, self.lr)


@dataclass(frozen=True)
class Measured:
    """What is measured of a task: samples to forget, and others to keep."""

    forget: list[AnswerTokens]
    retain: list[AnswerTokens]


def losses_of(name: str) -> UnlearningConfig:
    """Return the section of the configuration that the flags of a loss mean."""
    words = dict(zip(*[iter((LOSSES | BETAS)[name].split())] * 2, strict=True))
    config = UnlearningConfig(forget="forget.jsonl")
    return replace(
        config,
        loss=words["--loss"],
        retain_loss=words["--retain-loss"],
        npo_beta=float(words.get("--npo-beta", config.npo_beta)),
        simnpo_beta=float(words.get("--simnpo-beta", config.simnpo_beta)),
    )


def batch_size(losses: UnlearningConfig) -> int:
    """Return the global batch."""
    return SIDE * losses.sides


def run_cell(
    cell: Cell,
    base: LoadedBase,
    config: RunConfig,
    corpus: Corpus,
    selection: Selection,
    measured: Measured,
    steps: Sequence[int],
) -> tuple[list[list[float]], list[float]]:
    """Return [step, forget probability, retain probability] at `steps`, and the loss of each step."""
    losses = losses_of(cell.loss)
    sides = {FORGET: selection.forget, RETAIN: selection.retain}
    sets = {
        name: base.tokens([corpus.samples[number] for number in sides[name]])
        for name in (FORGET, RETAIN)[: losses.sides]
    }
    batches = AnswerBatches(UnlearningSamples(sets, base.tokenizer, SEQ_LENGTH, cell.seed))
    base.reset()
    batches.reference = reference_of(base, sets, losses)
    parameters = logical_parameters(base.decoder)
    old = config.optimizer
    own = OptimizerConfig(
        lr=cell.lr, weight_decay=old.weight_decay, adam_beta1=old.adam_beta1, adam_beta2=old.adam_beta2
    )
    optimizer = make_optimizer(parameters, own, torch.device("cpu"))
    loss_of = UnlearningLoss(losses, base.loss)
    trained, points = [], []
    count = batch_size(losses)
    weights = [parameter for _, parameter in parameters.values()]
    for step in range(1, steps[-1] + 1):
        tokens_BT, targets = batches.micro_batch(range((step - 1) * count, step * count))
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(base.decoder(tokens_BT), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, old.clip_grad)
        optimizer.step()
        trained.append(float(loss.detach()))
        if step in steps:
            found = base.probability(measured.forget), base.probability(measured.retain)
            points.append([step, *(round(value, 5) for value in found)])
    return points, trained


@torch.no_grad()
def reference_of(
    base: LoadedBase, sets: dict[str, list[AnswerTokens]], losses: UnlearningConfig
) -> Reference:
    """Return what the losses need of the base model, whose weights the decoder has."""
    log_p: list[float] = []
    if losses.loss == "npo":
        tokens_BT, labels_BT, mask_BT = answer_batch(sets[FORGET])
        scores_BT = base.loss.token_scores(base.decoder(tokens_BT), labels_BT)[0]
        log_p = (scores_BT * mask_BT).double().sum(1).tolist()
    if losses.retain_loss != "klr":
        return Reference(log_p)
    tokens_BT, _, mask_BT = answer_batch(sets[RETAIN])
    logits_BTV = base.decoder(tokens_BT).transpose(0, 1)
    rows = logits_BTV[mask_BT > 0].numpy().astype(np.float32)
    lengths = tuple(int(count) for count in mask_BT.sum(1))
    columns = base.loss.vocabulary_range
    record = LogitsFile("", tuple(range(len(lengths))), lengths, columns)
    return Reference(log_p, [(record, rows)], columns, base.loss.vocabulary_width)

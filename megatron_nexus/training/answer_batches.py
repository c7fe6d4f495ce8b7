"""Micro-batches of answers: tokens, and what the losses of unlearning need besides logits.

B micro batch, T tokens of the longest sample of the run, V the part of the vocabulary on this rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nexus.data.answers import IGNORED_LABEL, AnswerTokens
from megatron_nexus.data.loader import answer_batch
from megatron_nexus.data.unlearning_samples import FORGET, UnlearningSamples
from megatron_nexus.training.reference import NO_REFERENCE, Reference
from megatron_nexus.training.unlearning_loss import AnswerTargets


def tokens_and_labels(answers: Sequence[AnswerTokens], rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels [rows, T], padded on the right, where no token sees it, and by empty rows."""
    tokens_BT = torch.zeros(rows, width, dtype=torch.int64)
    labels_BT = torch.full((rows, width), IGNORED_LABEL, dtype=torch.int64)
    if answers:
        tokens_bT, labels_bT, mask_bT = answer_batch(answers, width)
        tokens_BT[: len(answers)] = tokens_bT
        labels_BT[: len(answers)] = labels_bT.masked_fill(mask_bT == 0, IGNORED_LABEL)
    return tokens_BT, labels_BT


class AnswerBatches:
    """The samples of an unlearning run as micro-batches, with what a loss needs of the reference model."""

    def __init__(self, samples: UnlearningSamples) -> None:
        self.samples = samples
        self.reference: Reference = NO_REFERENCE

    def micro_batch(self, numbers: Sequence[int]) -> tuple[Tensor, AnswerTargets]:
        """Return tokens [B, T] of the samples of these numbers, and their targets."""
        places = [self.samples.place(k) for k in numbers]
        answers = [self.samples.sets[name][index] for name, index in places]
        tokens_BT, labels_BT = tokens_and_labels(answers, len(places), self.samples.width)
        forget_B = torch.tensor([name == FORGET for name, _ in places])
        log_p = [self.reference.log_p(index) if name == FORGET else 0.0 for name, index in places]
        retained = [None if name == FORGET else index for name, index in places]
        logits_TBV = self.reference.logits(retained, labels_BT)
        return tokens_BT, AnswerTargets(labels_BT, forget_B, torch.tensor(log_p), logits_TBV)

"""Micro-batches of answers: tokens, and what the losses of unlearning need besides logits.

B micro batch, T tokens of the longest sample of the run, V the part of the vocabulary on this rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_nexus.data.loader import tokens_and_labels
from megatron_nexus.data.unlearning_samples import FORGET, UnlearningSamples
from megatron_nexus.training.reference import NO_REFERENCE, Reference
from megatron_nexus.training.unlearning_loss import AnswerTargets


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

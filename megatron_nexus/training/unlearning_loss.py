"""The losses of unlearning: of answers to forget, and of answers to retain.

With y the answer of |y| tokens to x, p the model, p_ref the model that was loaded:

    ga       (1/|y|) log p(y|x)                                            gradient ascent
    graddiff ga, and gdr of answers to retain                              arXiv 2203.12817; TOFU, 2401.06121
    npo      (2/beta) log(1 + (p(y|x) / p_ref(y|x))^beta)                  arXiv 2404.05868, eq. 3
    simnpo   -(2/beta) log sigmoid(-(beta/|y|) log p(y|x) - gamma)         arXiv 2410.07163, eq. 4
    gdr      -(1/|y|) log p(y|x)                                           of answers to retain
    klr      (1/|y|) sum over tokens of KL(p_ref || p)                     of answers to retain

A step's loss is the mean over the answers to forget + --retain-weight x the mean over those to retain. As
beta goes to 0 the gradient of npo tends to that of log p(y|x), |y| times ga's.

B samples, half of a step's of each set where both have a loss; T tokens; V the part of the vocabulary on
this rank.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.config.unlearning_config import UnlearningConfig
from megatron_nexus.data.answers import IGNORED_LABEL
from megatron_nexus.models.decoder import Loss
from megatron_nexus.parallel.cross_entropy import (
    vocabulary_parallel_divergence,
    vocabulary_parallel_token_losses,
)


class AnswerTargets(NamedTuple):
    """What the loss of a micro-batch needs besides its logits."""

    labels_BT: Tensor
    """The token to predict at each place of the answer, IGNORED_LABEL elsewhere."""
    forget_B: Tensor
    """Whether the sample is one to forget."""
    reference_B: Tensor
    """log p_ref(y|x) of the samples to forget, for npo."""
    reference_TBV: Tensor
    """The logits of the loaded model, for klr; else [T, B, 0]."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return what `function` makes of each tensor."""
        return type(self)(*map(function, self))


def forget_loss(config: UnlearningConfig, log_p_B: Tensor, length_B: Tensor, reference_B: Tensor) -> Tensor:
    """Return the loss of each answer to forget [B], from log p(y|x), |y| and log p_ref(y|x)."""
    if config.loss == "npo":
        # softplus(beta r) is log(1 + e^(beta r)) without overflow
        beta = config.npo_beta
        return (2.0 / beta) * F.softplus(beta * (log_p_B - reference_B), threshold=1e9)
    if config.loss == "simnpo":
        beta = config.simnpo_beta
        return (-2.0 / beta) * F.logsigmoid(-beta * log_p_B / length_B - config.simnpo_gamma)
    return log_p_B / length_B


class UnlearningLoss:
    """The loss of a micro-batch of samples to forget and to retain."""

    def __init__(self, config: UnlearningConfig, loss: Loss) -> None:
        self._config = config
        self._loss = loss

    def __call__(self, logits_TBV: Tensor, targets: AnswerTargets) -> Tensor:
        """Return the mean over B of each sample's loss, a scalar; of two sets twice that.

        So the mean over a step's micro-batches is the loss of the file's docstring, however samples are
        spread over them. The same on every tensor-parallel rank; the logits are overwritten.
        """
        targets = AnswerTargets(*targets)  # a pipeline hands on a plain tuple
        length_B = (targets.labels_BT != IGNORED_LABEL).sum(dim=1)
        if self._config.retain_loss == "klr":
            loss_B = self._with_divergence(logits_TBV, targets, length_B)
        else:
            log_p_B = self._log_p(logits_TBV, targets.labels_BT)
            forget_B = forget_loss(self._config, log_p_B, length_B, targets.reference_B)
            retain_B = -self._config.retain_weight * log_p_B / length_B
            loss_B = torch.where(targets.forget_B, forget_B, retain_B)
        return self._config.sides * loss_B.mean()

    def _log_p(self, logits_TBV: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the log-probability of each answer [B]."""
        loss = self._loss
        losses_N = vocabulary_parallel_token_losses(
            logits_TBV, labels_BT.t(), loss.vocabulary_range, loss.tp, loss.kernel
        )
        answer_TB = labels_BT.t() != IGNORED_LABEL
        return -(losses_N.view(answer_TB.shape) * answer_TB).sum(dim=0)

    def _with_divergence(self, logits_TBV: Tensor, targets: AnswerTargets, length_B: Tensor) -> Tensor:
        """Return the loss of each sample, the forget set's first; the logits of each set are copied."""
        losses = []
        forget_b = targets.forget_B.nonzero()[:, 0]
        retain_b = (~targets.forget_B).nonzero()[:, 0]
        if len(forget_b):
            log_p = self._log_p(logits_TBV[:, forget_b], targets.labels_BT[forget_b])
            reference = targets.reference_B[forget_b]
            losses.append(forget_loss(self._config, log_p, length_B[forget_b], reference))
        if len(retain_b):
            divergence_N = vocabulary_parallel_divergence(
                logits_TBV[:, retain_b],
                targets.reference_TBV[:, retain_b],
                self._loss.vocabulary_range,
                self._loss.tp,
            )
            answer_TB = targets.labels_BT[retain_b].t() != IGNORED_LABEL
            total = (divergence_N.view(answer_TB.shape) * answer_TB).sum(dim=0)
            losses.append(self._config.retain_weight * total / length_B[retain_b])
        return torch.cat(losses)

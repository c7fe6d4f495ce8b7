"""Law: the losses of unlearning and their gradients equal their equations in plain torch, in float64."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.unlearning_config import UnlearningConfig
from megatron_nexus.data.answers import IGNORED_LABEL, AnswerTokens
from megatron_nexus.data.unlearning_samples import FORGET, RETAIN, UnlearningSamples
from megatron_nexus.errors import CheckpointError
from megatron_nexus.models.decoder import Loss
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.answer_batches import AnswerBatches
from megatron_nexus.training.reference import LogitsFile, Reference, ReferenceFolder
from megatron_nexus.training.unlearning_loss import AnswerTargets, UnlearningLoss

T, B, V = 7, 4, 11


def batch(seed: int = 0, lengths: tuple[int, ...] = (3, 5, 1, 4)) -> tuple[Tensor, AnswerTargets]:
    """Logits [T, B, V], of which samples 0 and 2 are to be forgotten, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    logits_TBV = 2.0 * torch.randn(T, B, V, generator=generator, dtype=torch.float64)
    labels_BT = torch.randint(0, V, (B, T), generator=generator)
    answer_BT = torch.stack([(torch.arange(T) >= 1) & (torch.arange(T) < 1 + k) for k in lengths])
    reference_TBV = 2.0 * torch.randn(T, B, V, generator=generator, dtype=torch.float64)
    reference_B = plain_log_p(reference_TBV, labels_BT.where(answer_BT, IGNORED_LABEL))
    forget_B = torch.tensor([True, False, True, False])
    labels_BT = labels_BT.where(answer_BT, IGNORED_LABEL)
    return logits_TBV, AnswerTargets(labels_BT, forget_B, reference_B, reference_TBV)


def plain_log_p(logits_TBV: Tensor, labels_BT: Tensor) -> Tensor:
    answer_BT = labels_BT != IGNORED_LABEL
    log_p_BTV = logits_TBV.log_softmax(-1).transpose(0, 1)
    return (log_p_BTV.gather(-1, labels_BT.clamp_min(0)[..., None])[..., 0] * answer_BT).sum(1)


def plain_loss(config: UnlearningConfig, logits_TBV: Tensor, targets: AnswerTargets) -> Tensor:
    """The docstring of `training.unlearning_loss`, sample by sample."""
    log_p_B = plain_log_p(logits_TBV, targets.labels_BT)
    q = targets.reference_TBV.softmax(-1)
    kl_TB = (q * (q.log() - logits_TBV.log_softmax(-1))).sum(-1)
    forget, retain = [], []
    for b in range(B):
        s, n = log_p_B[b], int((targets.labels_BT != IGNORED_LABEL)[b].sum())
        if not targets.forget_B[b]:
            kl = kl_TB[(targets.labels_BT != IGNORED_LABEL)[b], b].sum() / n
            retain.append({"gdr": -s / n, "klr": kl, "none": 0.0 * s}[config.retain_loss])
            continue
        ratio, beta, simple = (s - targets.reference_B[b]).exp(), config.npo_beta, config.simnpo_beta
        margin = -simple / n * s - config.simnpo_gamma
        forget.append(
            {
                "ga": s / n,
                "graddiff": s / n,
                "npo": 2 / beta * (1 + ratio**beta).log(),
                "simnpo": 2 / simple * (1 + (-margin).exp()).log(),
            }[config.loss]
        )
    return torch.stack(forget).mean() + config.retain_weight * torch.stack(retain).mean()


def loss_and_gradient(
    config: UnlearningConfig, logits_TBV: Tensor, targets: AnswerTargets
) -> tuple[Tensor, Tensor]:
    model = ModelConfig(vocab_size=V)
    loss = UnlearningLoss(config, Loss(model, TensorParallel(None), Shard(0, 1)))
    z = logits_TBV.clone().requires_grad_()
    value = loss(z * 1, targets)
    return value, torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("retain_loss", ["gdr", "klr"])
@pytest.mark.parametrize("loss", ["ga", "graddiff", "npo", "simnpo"])
def test_a_loss_is_its_equation(loss: str, retain_loss: str) -> None:
    config = UnlearningConfig(
        loss=loss,  # type: ignore[arg-type]
        retain_loss=retain_loss,  # type: ignore[arg-type]
        retain_weight=0.7,
        npo_beta=0.3,
        simnpo_gamma=0.2,
    )
    logits_TBV, targets = batch()
    z = logits_TBV.clone().requires_grad_()
    expected = plain_loss(config, z, targets)
    gradient = torch.autograd.grad(expected, z)[0]
    mine, my_gradient = loss_and_gradient(config, logits_TBV, targets)
    assert abs(float((mine - expected).detach())) < 1e-12
    assert float((my_gradient - gradient).abs().max()) < 1e-12
    # Where no answer is, no gradient is.
    assert not my_gradient[~(targets.labels_BT != IGNORED_LABEL).t()].any()


def test_without_a_retain_loss_the_loss_is_the_forget_sets_mean() -> None:
    logits_TBV, targets = batch()
    targets = targets._replace(forget_B=torch.ones(B, dtype=torch.bool))
    value, _ = loss_and_gradient(UnlearningConfig(loss="ga", retain_loss="none"), logits_TBV, targets)
    length_B = (targets.labels_BT != IGNORED_LABEL).sum(1)
    expected = (plain_log_p(logits_TBV, targets.labels_BT) / length_B).mean()
    assert abs(float((value - expected).detach())) < 1e-12


def test_the_mean_over_micro_batches_is_the_loss_of_the_batch_however_samples_are_spread() -> None:
    logits_TBV, targets = batch()
    for retain_loss in ("gdr", "klr"):
        config = UnlearningConfig(retain_loss=retain_loss)  # type: ignore[arg-type]
        whole, _ = loss_and_gradient(config, logits_TBV, targets)
        parts = []
        for rows in ([0], [1], [2], [3]), ([0, 2], [1, 3]):
            for row in rows:
                reference = targets.reference_TBV[:, row]
                part = AnswerTargets(*(x[row] for x in targets[:3]), reference)
                parts.append(loss_and_gradient(config, logits_TBV[:, row], part)[0])
            assert abs(float((torch.stack(parts).mean() - whole).detach())) < 1e-12
            parts.clear()


def test_npo_tends_to_gradient_ascent_and_lets_go_of_what_is_forgotten() -> None:
    """2404.05868, section 3: towards beta 0 the gradient is gradient ascent's; it vanishes with p / p_ref."""
    logits_TBV, targets = batch(lengths=(3, 3, 3, 3))
    targets = targets._replace(forget_B=torch.ones(B, dtype=torch.bool))
    ascent = UnlearningConfig(loss="ga", retain_loss="none")
    _, of_ga = loss_and_gradient(ascent, logits_TBV, targets)
    previous = math.inf
    for beta in (1e-1, 1e-3, 1e-5):
        npo = replace(ascent, loss="npo", npo_beta=beta)
        _, gradient = loss_and_gradient(npo, logits_TBV, targets)
        error = float((gradient / 3 - of_ga).norm() / of_ga.norm())
        assert error < previous / 30
        previous = error
    assert previous < 1e-4
    forgotten = targets._replace(reference_B=targets.reference_B + 1000.0)
    _, gone = loss_and_gradient(replace(ascent, loss="npo"), logits_TBV, forgotten)
    assert float(gone.abs().max()) < 1e-30
    # A reference as likely as the model has the weight of 2 sigmoid(0) = 1: gradient ascent at any beta.
    log_p_B = plain_log_p(logits_TBV, targets.labels_BT)
    _, at_start = loss_and_gradient(
        replace(ascent, loss="npo", npo_beta=2.0), logits_TBV, targets._replace(reference_B=log_p_B)
    )
    assert float((at_start / 3 - of_ga).abs().max()) < 1e-12


def test_simnpo_is_npo_of_the_mean_with_an_even_reference() -> None:
    """2410.07163, section 4: length-normalised, and the margin gamma in place of the reference."""
    logits_TBV, targets = batch()
    targets = targets._replace(forget_B=torch.ones(B, dtype=torch.bool))
    config = UnlearningConfig(loss="simnpo", retain_loss="none", simnpo_beta=1e-6)
    _, gradient = loss_and_gradient(config, logits_TBV, targets)
    _, of_ga = loss_and_gradient(replace(config, loss="ga"), logits_TBV, targets)
    assert float((gradient - of_ga).norm() / of_ga.norm()) < 1e-5  # beta to 0: gradient ascent


def test_a_rank_that_holds_padding_alone_has_no_reference_logits() -> None:
    file = LogitsFile("logits_0.npy", samples=(0,), lengths=(2,), columns=(0, 8))
    rows, labels_BT = np.ones((2, 8), np.float32), torch.tensor([[IGNORED_LABEL, 3, 4]])
    held_TBV = Reference((), [(file, rows)], columns=(0, 8), width=10).logits([0], labels_BT)
    assert held_TBV[1:, :, :8].eq(1.0).all() and held_TBV.sum() == rows.sum()
    assert not Reference((), [(file, rows)], columns=(8, 8), width=10).logits([0], labels_BT).any()


def test_a_changed_byte_of_the_reference_logits_is_told(tmp_path: Path) -> None:
    folder = ReferenceFolder(tmp_path, "samples")
    folder.begin()
    record = LogitsFile("logits_0.npy", samples=(0,), lengths=(2,), columns=(0, 8))
    rows = folder.open_logits(record)
    rows[:] = np.arange(16, dtype=np.float32).reshape(2, 8)
    folder.finish([], [folder.close_logits(record, rows)])
    labels_BT = torch.tensor([[IGNORED_LABEL, 3, 4]])
    held_TBV = folder.read((0, 8), 8, verifies=True).logits([0], labels_BT)
    assert np.array_equal(held_TBV[1:, 0].numpy(), rows)
    path = tmp_path / "reference" / "logits_0.npy"
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"checksum of logits_0\.npy.*copy the folder again"):
        folder.read((0, 8), 8, verifies=True)
    folder.read((0, 8), 8, verifies=False)  # other ranks leave it to the first


@pytest.mark.parametrize(("seq_length", "multiple", "width"), [(64, 8, 16), (64, 32, 32), (14, 8, 14)])
def test_a_micro_batch_is_as_wide_as_the_longest_sample_of_the_run(
    seq_length: int, multiple: int, width: int
) -> None:
    """Not as --seq-length; the same for all, as a pipeline needs, and a multiple for sequence parallelism."""
    sets = {FORGET: [AnswerTokens((1, 2, 3), 1)], RETAIN: [AnswerTokens(tuple(range(14)), 5)]}
    samples = UnlearningSamples(sets, None, seq_length, 1, multiple)  # type: ignore[arg-type]
    for numbers in ([0], [1], [0, 1]):
        tokens_BT, targets = AnswerBatches(samples).micro_batch(numbers)
        assert tokens_BT.shape == targets.labels_BT.shape == (len(numbers), width)
    assert int((targets.labels_BT != IGNORED_LABEL).sum()) == 2 + 9

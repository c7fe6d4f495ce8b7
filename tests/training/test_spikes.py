"""The spike score is OLMo-core's: standard deviations above the mean of the last finite values."""

import json
import math
from pathlib import Path

import pytest

from megatron_nexus.checkpoint.manifest import DataRecord
from megatron_nexus.config.run_config import TrainingConfig
from megatron_nexus.training.faults import FiniteCheckpoints
from megatron_nexus.training.metrics import StepMetrics
from megatron_nexus.training.spike_policy import SpikeDetector, SpikePolicy, recent_steps

STEPS = [(3.0, 1.0), (3.2, 1.1), (2.8, 0.9), (3.0, 1.0)]


def detector(length: int = 8, sigmas: float = 6.0) -> SpikeDetector:
    made = SpikeDetector(length, sigmas)
    made.restore(STEPS)
    return made


def test_the_score_counts_standard_deviations_of_loss_and_norm() -> None:
    losses = [loss for loss, _ in STEPS]
    deviation = math.sqrt(sum((loss - 3.0) ** 2 for loss in losses) / 3)  # unbiased, as torch.std
    assert detector().score(3.0 + 5 * deviation, 1.0) == pytest.approx(5.0)
    assert detector().score(None, 1.0 + 7 * deviation / 2) == pytest.approx(7.0)
    assert detector().score(-100.0, 0.0) == 0.0, "only values above the mean are spikes"
    assert detector().admits(3.0 + 5.9 * deviation, 1.0)
    assert not detector().admits(3.0 + 6.1 * deviation, 1.0)
    assert not detector().admits(3.0, 1.0 + 6.1 * deviation / 2)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (3.0, math.inf)])
def test_what_is_not_finite_is_a_spike_from_the_first_step(loss: float, norm: float) -> None:
    assert SpikeDetector(128, 6.0).score(loss, norm) == math.inf
    assert SpikeDetector(128, 6.0).score(1e9, 1e9) == 0.0, "nothing is known yet"


def test_few_steps_raise_no_spike_and_old_ones_are_forgotten() -> None:
    assert detector(length=12).admits(1e9, 1e9), "fewer than half of the interval"
    full = detector(length=4)
    for _ in range(4):
        full.add(50.0, 1.0)
    assert full.score(50.0, 1.0) == 0.0


def test_samples_that_are_left_out_are_passed_over_once() -> None:
    data = DataRecord("f", "d", first_sample=2, left_out=((8, 4), (12, 4)))
    assert data.past_left_out(9) == data
    moved = data.past_left_out(10)  # the ninth of the data, after which eight follow that are left out
    assert 10 - moved.first_sample == 16
    assert moved.past_left_out(10) == moved


def test_steps_without_a_finite_norm_are_known_again_after_a_restart(tmp_path: Path) -> None:
    lines = [{"step": n, "loss": 3.0 + n, "grad_norm": math.inf if n == 3 else 1.0 / n} for n in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = detector()
    made.restore(recent_steps(tmp_path / "metrics.jsonl", 5, 4))
    whole = SpikeDetector(8, 6.0)
    whole.restore([(5.0, 0.5), (6.0, math.inf), (7.0, 0.25), (8.0, 0.2)])
    assert made.score(20.0, 0.1) == whole.score(20.0, 0.1) > 0.0


def test_a_spike_that_ends_a_run_is_answered_with_another_policy_than_the_one_it_has() -> None:
    policies = {kind: TrainingConfig(spike_policy=kind) for kind in ("stop", "skip", "rewind")}
    messages = {kind: str(SpikePolicy(made, None, None).error(4, "")) for kind, made in policies.items()}
    assert (
        "--spike-policy skip or rewind" in messages["stop"] and "--spike-policy skip," in messages["rewind"]
    )
    assert (
        "rewind" not in messages["rewind"]
        and "--spike-policy" not in messages["skip"]
        and "--lr" in messages["skip"]
    )


def step_of(step: int, loss: float) -> StepMetrics:
    return StepMetrics(step, loss, 0.0, 1.0, 0, 1.0, 1.0, 0.0, None, 0, math.isnan(loss) or None)


def test_a_skipped_step_of_nan_does_not_vouch_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = FiniteCheckpoints()
    checkpoints.after_save(3, tmp_path)
    checkpoints.after_step(step_of(4, math.nan))
    assert checkpoints.last_good() is None
    checkpoints.after_step(step_of(4, 3.0))
    assert checkpoints.last_good() == tmp_path

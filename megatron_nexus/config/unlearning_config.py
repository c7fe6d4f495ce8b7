"""The section of a configuration that `nexus unlearn` adds: what to forget and retain, and the losses."""

from dataclasses import dataclass
from typing import Literal

from megatron_nexus.config.config_field import config_field

ForgetLoss = Literal["ga", "graddiff", "npo", "simnpo"]
RetainLoss = Literal["none", "gdr", "klr"]


@dataclass(frozen=True)
class UnlearningConfig:
    """Which answers an unlearning run forgets and retains, and its losses: flags of `nexus unlearn` alone."""

    forget: str = config_field("", ".jsonl of samples to forget: prompt and answer, or text, a line")
    retain: str = config_field("", ".jsonl of samples to retain; empty: --retain-loss none")
    loss: ForgetLoss = config_field(
        "npo", "of the forget set: ga (gradient ascent), graddiff (ga with --retain-loss gdr), npo or simnpo"
    )
    retain_loss: RetainLoss = config_field(
        "gdr", "of the retain set: gdr (its negative log-likelihood), klr (KL to the loaded model) or none"
    )
    retain_weight: float = config_field(1.0, "weight of the retain loss; that of the forget loss is 1")
    npo_beta: float = config_field(0.1, "inverse temperature of NPO; towards 0 it is ga", positive=True)
    simnpo_beta: float = config_field(4.5, "inverse temperature of SimNPO", positive=True)
    simnpo_gamma: float = config_field(0.0, "reward margin of SimNPO, in nats per token times its beta")

    @property
    def is_on(self) -> bool:
        """Whether the run unlearns."""
        return bool(self.forget)

    @property
    def sides(self) -> int:
        """The sets of which each global batch holds equal parts: forget, and retain if it has a loss."""
        return 1 if self.retain_loss == "none" else 2

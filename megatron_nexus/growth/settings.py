"""How the new weights of a growth begin."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_nexus.config.config_field import config_field
from megatron_nexus.config.model_config import InnerAttention
from megatron_nexus.spec.growth_rule import SPLIT_SHARE, Init

Placement = Literal["interleaved", "end"]
DepthInit = Literal["random", "copy", "stack"]
Moments = Literal["kept", "copied", "reset"]
InitChoice = Literal["auto", Init]
"""What --init takes: a rule, or the one of two that suits the model."""

ZERO_WARNING = (
    "--init zero is the paper's choice, and no gradient will ever reach the new blocks: gelu(0) = 0.\n"
    "The grown model computes and trains exactly as the old one; drop --init to put the new weights to use."
)


@dataclass(frozen=True)
class GrowthConfig:
    """How new weights begin."""

    init: InitChoice = config_field(
        "auto",
        "which factor of each new path is zero. out_rand: the one that writes new units; in_rand: the one "
        "that reads them; auto: in_rand, or out_rand where a norm would see new units at once and the "
        "function change (inner norm, Pattention slots); zero: both, which never trains. split: new units "
        "are copies of old ones, which "
        "share their outgoing weights; pairs: new units in pairs of equal incoming and opposite outgoing "
        "weights; the function stays too. noise and random: none, so the function changes "
        "(random: new initial values, and the scale of the new slots of Pattention, as Tokenformer's code "
        "grows)",
    )
    split_share: float = config_field(
        SPLIT_SHARE,
        "with --init split: the old unit's share of its outgoing weights, the copy has the rest; 0.5 to 2. "
        "Below 1 both have the same sign, and Adam hardly moves them apart",
        positive=True,
    )
    init_std: float = config_field(
        0.0, "deviation of random new weights; 0: --init-method-std of the checkpoint's model"
    )
    noise_share: float = config_field(
        0.1, "deviation of --init noise, as a share of each old tensor's", positive=True
    )
    growth_seed: int = config_field(1234, "seed of the new weights")
    depth_placement: Placement = config_field(
        "interleaved",
        "new layers of --depth-init copy and random: interleaved with the old ones, or all at the end, where "
        "a stack always is",
    )
    depth_init: DepthInit = config_field(
        "stack",
        "what new layers begin as. random: initial values; copy: the old layer before each; both with zeros "
        "where they write to the residual stream, so the function stays. stack: the old layers again, whole "
        "and in their order, 0 1 0 1, at the end (G_stack): the function changes, the loss jumps, and it "
        "ended lowest where it was measured (docs/progressive_scaling.md)",
    )
    moments: Moments = config_field(
        "copied",
        "Adam's moments. kept: the old ones stay, new weights begin with zeros and a step count of their "
        "own; copied: besides, copied weights begin with the moments and step count of their source; reset: "
        "all are zero",
    )
    attention_inner: InnerAttention = config_field(
        "self",
        "with --attention-order: scores of the inner attentions that the model is given, self or cross",
    )

    @property
    def fill_rule(self) -> Init:
        """What fills new units, of settings that are resolved for a model."""
        assert self.init != "auto", "a request is resolved for its model first"
        return self.init

    @property
    def placement(self) -> Placement:
        """Where new layers go: a stack is always at the end."""
        return "end" if self.depth_init == "stack" else self.depth_placement


STACKING = "--depth-init stack"
"""Changes the function, and ended lowest where it was measured."""
CHANGING: tuple[Init, ...] = ("noise", "random")
"""What leaves no zero factor on new paths, and so changes the function by intent."""


def changes_of_function(settings: GrowthConfig, axes: Collection[str]) -> list[str]:
    """Return the flags by which a growth of the sizes `axes` changes the function by intent."""
    flags = [f"--init {settings.init}"] if settings.init in CHANGING and axes else []
    if settings.depth_init == "stack" and "num_layers" in axes:
        flags.append(STACKING)
    return flags


UNRECORDED: Mapping[str, object] = {
    "depth_init": "random",
    "moments": "kept",
    "split_share": SPLIT_SHARE,
}
"""What versions did that knew no such settings, and so recorded none."""
EARLIER: Mapping[str, object] = {"init": "out_rand", "depth_init": "random", "moments": "kept"}
"""Defaults until 0.2.0 whose place others have taken."""


def recorded_settings(growth: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a growth in a lineage, those included that were not recorded then."""
    return {**UNRECORDED, **growth["settings"]}

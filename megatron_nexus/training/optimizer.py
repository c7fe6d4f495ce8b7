"""AdamW over two groups of parameters: those that decay and those that do not, as their specs say.

Three implementations of one equation (Loshchilov and Hutter, 2019): torch's fused one, which needs nothing,
and those of NVIDIA's apex and of DeepSpeed. `Engine.optimizer` is DeepSpeed's, which steps this one:
`engine.optimizer.optimizer`.
"""

import torch
from torch import nn

from megatron_nexus.config.optimizer_groups import DECAY, NO_DECAY, bucket_ranges, group_settings
from megatron_nexus.config.run_config import OptimizerConfig
from megatron_nexus.models.nvidia_apex import fused_adam
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.training.deepspeed_adam import deepspeed_adam


def make_optimizer(
    parameters: dict[str, tuple[ParamSpec, nn.Parameter]],
    optimizer: OptimizerConfig,
    device: torch.device,
    bucket_elements: int = 0,
) -> torch.optim.Optimizer:
    """AdamW of `optimizer.optimizer_impl`. A stage without parameters of a group has no such group.

    With `bucket_elements` each group comes as several of its name: the buckets of `GradientReducer`.
    """
    filled: list[dict[str, object]] = []
    for decays, name in ((True, DECAY), (False, NO_DECAY)):
        members = [parameter for spec, parameter in parameters.values() if spec.decays is decays]
        for bucket in bucket_ranges([parameter.numel() for parameter in members], bucket_elements):
            settings = {"lr": optimizer.lr, "name": name, **group_settings(optimizer, name)}
            filled.append({"params": [members[index] for index in bucket], **settings})
    match optimizer.optimizer_impl:
        case "apex":
            return fused_adam(filled)
        case "deepspeed":
            return deepspeed_adam(filled, device)
        case "torch":
            return torch.optim.AdamW(filled, fused=True)


def configure_groups(groups: list[dict[str, object]], optimizer: OptimizerConfig) -> None:
    """Set the groups' hyper-parameters as this run has them: loading a checkpoint has put in those saved."""
    for group in groups:
        group.update(group_settings(optimizer, str(group["name"])))

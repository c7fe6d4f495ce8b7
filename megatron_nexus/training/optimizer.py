"""AdamW over two groups of parameters: those that decay and those that do not, as their specs say."""

import torch
from torch import nn

from megatron_nexus.config.run_config import OptimizerConfig
from megatron_nexus.spec.param import ParamSpec


def make_optimizer(
    parameters: dict[str, tuple[ParamSpec, nn.Parameter]], optimizer: OptimizerConfig
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter, 2019). A stage without parameters of a group has no such group."""
    groups = [
        {
            "name": name,
            "params": [parameter for spec, parameter in parameters.values() if spec.decays is decays],
            "weight_decay": optimizer.weight_decay if decays else 0.0,
        }
        for name, decays in (("decay", True), ("no_decay", False))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        fused=True,
    )

"""The optimizer's two groups of parameters, by the names under which checkpoints keep them."""

from megatron_nexus.config.run_config import OptimizerConfig

DECAY, NO_DECAY = "decay", "no_decay"


def group_settings(optimizer: OptimizerConfig, name: str) -> dict[str, float | tuple[float, float]]:
    """Return AdamW's hyper-parameters of the group `name`, without the scheduled learning rate."""
    return {
        "weight_decay": optimizer.weight_decay if name == DECAY else 0.0,
        "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
        "eps": optimizer.adam_eps,
    }

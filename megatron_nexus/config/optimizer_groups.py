"""The optimizer's two groups of parameters, by the names under which checkpoints keep them."""

from collections.abc import Sequence

from megatron_nexus.config.run_config import OptimizerConfig

DECAY, NO_DECAY = "decay", "no_decay"


def group_settings(optimizer: OptimizerConfig, name: str) -> dict[str, float | tuple[float, float]]:
    """Return AdamW's hyper-parameters of the group `name`, without the scheduled learning rate."""
    return {
        "weight_decay": optimizer.weight_decay if name == DECAY else 0.0,
        "betas": (optimizer.adam_beta1, optimizer.adam_beta2),
        "eps": optimizer.adam_eps,
    }


def bucket_ranges(sizes: Sequence[int], elements: int) -> list[range]:
    """Cut parameters of these sizes into buckets of at least `elements` numbers; into one where that is 0.

    They are counted from the last one, whose gradient is complete first: what is left over comes first.
    """
    ends, gathered = [len(sizes)], 0
    for index in range(len(sizes) - 1, 0, -1):
        gathered += sizes[index]
        if 0 < elements <= gathered:
            ends.append(index)
            gathered = 0
    return [range(*pair) for pair in zip([0, *ends[:0:-1]], ends[::-1], strict=True)] if sizes else []

"""What the Nexusformer paper prints of its own models; this project prints the true numbers next to it.

Its sizes by name are `PAPER_SIZES`, its configurations are the presets but for the rows below.
"""

from megatron_nexus.config.presets import PAPER_SIZES, Value

# Table 8, which does not say what it counts; its rows of other sizes print none.
PRINTED_FLOPS_PER_TOKEN = {
    "nexusformer-240m": 425_600_000,
    "nexusformer-300m": 564_800_000,
    "qwen3-240m": 422_300_000,
    "qwen3-300m": 603_600_000,
}
# Table 7 gives models that have grown from 240M in M and A another hidden size than its 768.
PRINTED_SIZES: dict[str, dict[str, Value]] = {
    "nexusformer-380m": {"hidden_size": 800, "num_attention_heads": 10, "kv_channels": 80},
    "nexusformer-440m": {"hidden_size": 1024, "num_attention_heads": 16, "kv_channels": 64},
}


def nominal_parameters(preset: str) -> int | None:
    """Return the number of parameters in the name that the paper gives a preset; None where it has none."""
    size = PAPER_SIZES.get(preset)
    return int(size.removesuffix("M")) * 1_000_000 if size is not None else None

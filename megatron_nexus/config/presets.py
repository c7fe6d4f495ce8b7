"""Named configurations: the sizes of the Nexusformer paper (Tables 6 and 7) and small ones of each family.

A preset is a set of field values over the defaults of `run_config`; flags win over it. The paper's names
do not follow from its own configurations: the true parameter count is printed next to the name.
"""

Value = int | float | str | bool | tuple[str, ...]

# Table 6: vocabulary 32,000, context 4,096, batches of about one million tokens. The paper prints no heads.
_PAPER: dict[str, Value] = {
    "vocab_size": 32000,
    "seq_length": 4096,
    "micro_batch_size": 4,
    "global_batch_size": 256,
    "train_iters": 30000,
    "lr": 6e-4,
    "min_lr": 6e-5,
    "lr_warmup_iters": 2000,
    "eval_interval": 1000,
    "save_interval": 1000,
}
# Learns on two CPU cores in minutes: small vocabulary, wider initial weights for its small width.
_TINY: dict[str, Value] = {
    "vocab_size": 4096,
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "ffn_hidden_size": 344,
    "init_method_std": 0.06,
    "seq_length": 128,
    "micro_batch_size": 16,
    "global_batch_size": 32,
    "train_iters": 100,
    "precision": "fp32",
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_warmup_iters": 10,
    "eval_interval": 50,
    "eval_iters": 4,
    "log_interval": 10,
}
_LINEAR: dict[str, Value] = {"projection": "linear", "nexus_m": 0, "nexus_a": 0}


# Tokenformer, whose LayerNorm has the epsilon of the code that its authors released.
_SLOTS: dict[str, Value] = {
    "projection": "pattention",
    "feed_forward": "pattention",
    "normalization": "NonParametricLayerNorm",
    "norm_epsilon": 1e-5,
    "nexus_m": 0,
    "nexus_a": 0,
}


def _nexus(m: int, a: int) -> dict[str, Value]:
    return {"projection": "nexus", "nexus_m": m, "nexus_a": a}


def _released(ffn_m: int, ffn_a: int) -> dict[str, Value]:
    return {
        "nexus_output_projection": True,
        "nexus_inner_norm": True,
        "nexus_inner_norm_scale": "width",
        "feed_forward": "nexus",
        "ffn_nexus_m": ffn_m,
        "ffn_hidden_size": ffn_a,
    }


def _paper(layers: int, hidden: int, ffn: int, heads: int, kv_channels: int) -> dict[str, Value]:
    sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn}
    return {**_PAPER, **sizes, "num_attention_heads": heads, "kv_channels": kv_channels}


def _nexusformer(layers: int, hidden: int, heads: int, ffn: int, m: int, a: int) -> dict[str, Value]:
    """Return a Nexusformer with heads of size 64, or of the nearest even divisor of the hidden size."""
    return {**_paper(layers, hidden, ffn, heads, hidden // heads), **_nexus(m, a)}


def _transformer(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Value]:
    """Return a Transformer++: heads as in `_nexusformer`, each with keys and values of its own."""
    return {**_paper(layers, hidden, ffn, heads, hidden // heads), **_LINEAR, "qk_layernorm": False}


def _tokenformer(
    layers: int, hidden: int, heads: int, kv_channels: int, ffn_slots: int, slots: int
) -> dict[str, Value]:
    """Tokenformer: heads as in `_nexusformer`, but in 380m, which grows from heads of size 64; the output
    projection has as many slots as Q, K and V each.
    """
    return {**_paper(layers, hidden, ffn_slots, heads, kv_channels), **_SLOTS, "pattention_slots": slots}


def _qwen3(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Value]:
    """Return a Qwen3 with heads of size 64, about hidden / 64 of them, two for each head of keys.

    As in Qwen3 itself, whose smallest has 16 heads of queries and 8 of keys, heads x head size is not bound
    to the hidden size.
    """
    return {
        **_paper(layers, hidden, ffn, heads, 64),
        **_LINEAR,
        "num_query_groups": heads // 2,
        "qk_layernorm": True,
        "rotary_base": 1e6,
    }


PRESETS: dict[str, dict[str, Value]] = {
    "nexusformer-tiny": {**_TINY, **_nexus(160, 192)},
    "qwen3-tiny": {**_TINY, **_LINEAR, "num_query_groups": 2, "qk_layernorm": True, "rotary_base": 1e6},
    "transformer++-tiny": {**_TINY, **_LINEAR, "qk_layernorm": False},
    "tokenformer-tiny": {**_TINY, **_SLOTS, "ffn_hidden_size": 512, "pattention_slots": 192},
    # As in the code that the paper's authors released: the attention's output and the feed-forward are
    # Nexus-Ranks too, with a norm before each GELU. The widths of the feed-forward are ours.
    "nexusformer-released-tiny": {**_TINY, **_nexus(160, 192), **_released(160, 344)},
    # 23.6M parameters: the size of benchmarks/train_step.py.
    "nexusformer-20m": {
        "vocab_size": 8192,
        "num_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "kv_channels": 64,
        "ffn_hidden_size": 1024,
        **_nexus(416, 448),
        "seq_length": 512,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_iters": 1000,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_iters": 50,
    },
    "nexusformer-170m": _nexusformer(12, 768, 12, 1706, 780, 800),
    "nexusformer-240m": _nexusformer(12, 768, 12, 2048, 780, 960),
    "nexusformer-300m": _nexusformer(12, 768, 12, 2048, 1088, 1228),
    "nexusformer-380m": _nexusformer(12, 768, 12, 2048, 1340, 1530),
    "nexusformer-440m": _nexusformer(12, 768, 12, 2048, 1540, 1730),
    "nexusformer-480m": _nexusformer(24, 800, 10, 2304, 896, 968),
    "nexusformer-640m": _nexusformer(24, 1024, 16, 2560, 1152, 1280),
    "nexusformer-released-240m": {**_nexusformer(12, 768, 12, 2048, 780, 960), **_released(780, 2048)},
    "qwen3-170m": _qwen3(12, 848, 12, 3392),
    "qwen3-240m": _qwen3(12, 1088, 16, 4032),
    "qwen3-300m": _qwen3(12, 1240, 20, 4880),
    "qwen3-380m": _qwen3(12, 1300, 20, 6912),
    "qwen3-440m": _qwen3(12, 1360, 20, 6912),
    "qwen3-480m": _qwen3(24, 1344, 20, 3760),
    "qwen3-640m": _qwen3(24, 1536, 24, 4608),
    "tokenformer-170m": _tokenformer(12, 768, 12, 64, 4096, 1024),
    "tokenformer-240m": _tokenformer(12, 768, 12, 64, 3072, 2088),
    "tokenformer-300m": _tokenformer(12, 768, 12, 64, 3072, 2952),
    "tokenformer-380m": _tokenformer(12, 800, 12, 64, 3072, 3960),
    "tokenformer-440m": _tokenformer(12, 1024, 16, 64, 3072, 4824),
    "tokenformer-480m": _tokenformer(24, 800, 10, 80, 5888, 1472),
    "tokenformer-640m": _tokenformer(24, 1024, 16, 64, 6144, 1536),
    "transformer++-170m": _transformer(12, 512, 8, 2048),
    "transformer++-240m": _transformer(12, 1024, 16, 2560),
    "transformer++-480m": _transformer(24, 1408, 22, 3648),
    "transformer++-640m": _transformer(24, 1632, 24, 4243),
}

DEFAULT_PRESET = "nexusformer-tiny"
# The sizes by which the paper calls its own.
PAPER_SIZES = {
    name: name.rpartition("-")[2].upper()
    for name, values in PRESETS.items()
    if _PAPER.items() <= values.items() and "released" not in name  # not the paper's architecture
}

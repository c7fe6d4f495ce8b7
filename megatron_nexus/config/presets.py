"""Named configurations: the sizes of the Nexusformer paper (Tables 6 and 7) and two small ones.

A preset is a set of field values over the defaults of `run_config`; flags win over it. The paper's names
do not follow from its own configurations: the true parameter count is printed beside the name.
"""

Value = int | float | str | bool | tuple[str, ...]

# Table 6: vocabulary 32,000, context 4,096, batches of about one million tokens. Heads are of size 64
# or, where 64 does not divide the hidden size, of the nearest even divisor (the paper prints no heads).
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


def _paper(layers: int, hidden: int, heads: int, ffn: int, m: int, a: int) -> dict[str, Value]:
    return {
        **_PAPER,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "ffn_hidden_size": ffn,
        "nexus_m": m,
        "nexus_a": a,
    }


PRESETS: dict[str, dict[str, Value]] = {
    # Learns on two CPU cores in minutes: small vocabulary, wider initial weights for its small width.
    "nexusformer-tiny": {
        "vocab_size": 4096,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "ffn_hidden_size": 344,
        "nexus_m": 160,
        "nexus_a": 192,
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
    },
    # 23.6M parameters: the size of benchmarks/train_step.py.
    "nexusformer-20m": {
        "vocab_size": 8192,
        "num_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "kv_channels": 64,
        "ffn_hidden_size": 1024,
        "nexus_m": 416,
        "nexus_a": 448,
        "seq_length": 512,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_iters": 1000,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_iters": 50,
    },
    "nexusformer-170m": _paper(12, 768, 12, 1706, 780, 800),
    "nexusformer-240m": _paper(12, 768, 12, 2048, 780, 960),
    "nexusformer-300m": _paper(12, 768, 12, 2048, 1088, 1228),
    "nexusformer-380m": _paper(12, 768, 12, 2048, 1340, 1530),
    "nexusformer-440m": _paper(12, 768, 12, 2048, 1540, 1730),
    "nexusformer-480m": _paper(24, 800, 10, 2304, 896, 968),
    "nexusformer-640m": _paper(24, 1024, 16, 2560, 1152, 1280),
}

DEFAULT_PRESET = "nexusformer-tiny"
# The sizes by which the paper calls its own.
PAPER_SIZES = {
    name: name.removeprefix("nexusformer-").upper()
    for name, values in PRESETS.items()
    if _PAPER.items() <= values.items()
}

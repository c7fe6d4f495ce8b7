"""The model whose plans are tested; M, A and the vocabulary are odd, so that tensor parallelism pads them."""

from megatron_nexus.config.presets import Value

SMALL: dict[str, Value] = {
    "vocab_size": 301,
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 10,
    "ffn_hidden_size": 90,
    "nexus_m": 45,
    "nexus_a": 53,
    "seq_length": 16,
    "micro_batch_size": 2,
    "global_batch_size": 8,
}

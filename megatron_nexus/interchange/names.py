"""What parameters are called in the files of Hugging Face.

    layers.3.attention.q.weight     model.layers.3.self_attn.q_proj.weight
    layers.3.attention.q.bias       model.layers.3.self_attn.q_proj.bias
    layers.3.attention.q.w_m        model.layers.3.self_attn.q_proj.w_m.weight
    layers.3.feed_forward.gate      model.layers.3.mlp.gate_proj.weight

transformers' own Llama, Mistral, Qwen2, Qwen3, OLMo 2 and SmolLM3 and our `modeling_nexusformer.py` call the
same things alike.
"""

ENDS = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.gain": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
PARTS = {
    "attention.norm": "input_layernorm",
    "attention.post_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.q_gate": "self_attn.q_gate",
    "attention.k_gate": "self_attn.k_gate",
    "attention.output": "self_attn.o_proj",
    "feed_forward.norm": "post_attention_layernorm",
    "feed_forward.post_norm": "post_feedforward_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "feed_forward.keys": "mlp.keys",
    "feed_forward.values": "mlp.values",
    "feed_forward.w_m": "mlp.w_m",
    "feed_forward.w_a": "mlp.w_a",
    "feed_forward.w_d": "mlp.w_d",
}


def huggingface_name(name: str) -> str:
    """Return Hugging Face's name of the parameter that is called `name` here."""
    if name in ENDS:
        return ENDS[name]
    layers, index, block, part, *rest = name.split(".")
    assert layers == "layers", f"{name} belongs to no layer"
    inner = [word for word in rest if word not in ("weight", "gain", "bias")]
    kind = "bias" if "bias" in rest else "weight"
    return ".".join(["model.layers", index, PARTS[f"{block}.{part}"], *inner, kind])

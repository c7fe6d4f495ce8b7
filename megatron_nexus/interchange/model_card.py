"""The model card of an exported folder: its `README.md`, with metadata for the Hugging Face Hub."""

import json
from pathlib import Path

from megatron_nexus.checkpoint.manifest import Manifest
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.interchange.architecture import Architecture
from megatron_nexus.spec.cost import parameter_count

CARD_FILE = "README.md"


def loading_code(architecture: Architecture, folder: str, has_tokenizer: bool) -> list[str]:
    """Return the lines of Python that load model and tokenizer of `folder`, without a question."""
    options = ", trust_remote_code=True" if architecture.files else ""
    names = {"model": "AutoModelForCausalLM"} | ({"tokenizer": "AutoTokenizer"} if has_tokenizer else {})
    return [
        f"from transformers import {', '.join(names.values())}",
        *(f"{name} = {kind}.from_pretrained({json.dumps(folder)}{options})" for name, kind in names.items()),
    ]


def write_model_card(
    path: Path,
    config: RunConfig,
    manifest: Manifest,
    architecture: Architecture,
    dtype: str,
    has_tokenizer: bool,
) -> None:
    """Write the card of the model that `manifest` holds. Raises OSError."""
    model, done = config.model, manifest.progress
    own_code = architecture.files
    needs = "5.23 or newer (the model's code lies in this folder)" if own_code else "4.57 or newer"
    sizes = {
        "parameters": f"{parameter_count(manifest.specs.values()):,}",
        "layers, hidden size": f"{model.num_layers}, {model.hidden_size}",
        "attention heads, query groups": f"{model.num_attention_heads}, {model.query_groups}",
        "vocabulary": f"{model.vocab_size:,}",
        "trained on": f"{done.tokens:,} tokens, samples of {config.training.seq_length:,}",
        "weights": dtype,
    }
    tags = ["megatron-nexus", architecture.model_type, *(["custom_code"] if own_code else [])]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        f"# {config.preset}",
        "",
        f"A causal language model, `{architecture.class_name}`, exported from step {done.step:,} of a run of",
        "megatron_nexus.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in sizes.items()),
        "",
        f"Load it with transformers {needs}, with this folder's path in place of `.`:",
        "",
        "```python",
        *loading_code(architecture, ".", has_tokenizer),
        "```",
        "",
        "Before you publish it, add its license, its training data and its evaluation.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")

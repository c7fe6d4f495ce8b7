"""Models of the families that people have: imported, upcycled, grown, exported back, by transformers' logits.

Small random models of each class; float64 throughout but where a type is the point.
"""

import copy
import dataclasses
import json
import os
import tempfile
from pathlib import Path

# Before the import: what it keeps of the code of a model goes nowhere else.
os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SmolLM3Config,
)

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.errors import ConfigError
from megatron_nexus.growth.request import with_empty_branch
from megatron_nexus.interchange.export import export_checkpoint, imported_as
from tests.interchange.test_import_hf import SIZES, import_folder, logits
from tests.support import checkpoints, reference

pytestmark = pytest.mark.slow  # the imports of transformers

EXACT = 1e-10  # rounding of float64 in sums of at most a hundred terms, over a few layers
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYERS = {**SIZES, "num_hidden_layers": 4}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama-3.1": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-3.2-tied": LlamaConfig(
        **SIZES, rope_parameters={**LLAMA3, "factor": 32.0}, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "olmo2": Olmo2Config(**SIZES, pad_token_id=None),
    "olmo2-tied": Olmo2Config(
        **{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True, pad_token_id=None
    ),
    "smollm3": SmolLM3Config(**LAYERS, tie_word_embeddings=False, pad_token_id=None),
    "smollm3-tied": SmolLM3Config(**LAYERS, no_rope_layer_interval=3, pad_token_id=None),
}
TOKENS = torch.randint(0, SIZES["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(1))
each_family = pytest.mark.parametrize("kind", CONFIGS)


def random_model(kind: str) -> PreTrainedModel:
    """A model with random weights, gains and biases included."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_()
    return model


def loaded_logits(folder: Path, remote: bool) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote, dtype=torch.float64)
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


@each_family
@pytest.mark.usefixtures("float64_hf_models")
def test_it_is_imported_upcycled_grown_and_exported_as_it_computes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path / "hf")
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    with torch.no_grad():
        expected = model.double()(TOKENS).logits
    assert (logits(checkpoint, config, TOKENS) - expected).abs().max() < EXACT

    made = export_checkpoint(checkpoint, tmp_path / "back", config, None, "fp32", 10**9)
    assert made.architecture.model_type == CONFIGS[kind].model_type and not made.architecture.files
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys(), "a head that came tied goes back tied"
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (loaded_logits(tmp_path / "back", remote=False) - expected).abs().max() < EXACT

    widths = {"nexus_m": 30, "nexus_a": 36}
    upcycled, after_config = checkpoints.grow(checkpoint, tmp_path / "up", with_empty_branch(config), widths)
    assert (logits(upcycled, after_config, TOKENS) - expected).abs().max() < EXACT
    larger = {"hidden_size": 28, "kv_channels": 8, "ffn_hidden_size": 44, "num_layers": 6, "nexus_m": 34}
    heads = config.model.num_attention_heads + config.model.num_attention_heads // 2
    larger |= {"num_attention_heads": heads, "num_query_groups": config.model.query_groups * 3 // 2}
    if kind.startswith("olmo2"):  # its norms hold these sizes
        for name in ("kv_channels", "num_attention_heads", "num_query_groups"):
            with pytest.raises(ConfigError, match="grow other sizes of this model"):
                checkpoints.grow(upcycled, tmp_path / "no", after_config, {name: larger.pop(name)})
        with pytest.raises(ConfigError, match="use --depth-init stack"):
            checkpoints.grow(upcycled, tmp_path / "no", after_config, {"num_layers": 6}, depth_init="copy")
        del larger["num_layers"]
    settings = {"depth_init": "random", "depth_placement": "end"} if "num_layers" in larger else {}
    last, last_config = checkpoints.grow(upcycled, tmp_path / "last", after_config, larger, **settings)
    assert (logits(last, last_config, TOKENS) - expected).abs().max() < EXACT
    own = export_checkpoint(last, tmp_path / "own", last_config, None, "fp32", 10**9)
    assert own.architecture.files
    assert (loaded_logits(tmp_path / "own", remote=True) - expected).abs().max() < EXACT
    again, again_config = import_folder(monkeypatch, tmp_path / "own", tmp_path / "again")
    assert again_config.model == last_config.model
    assert imported_as(read_manifest(again)) == "nexusformer"


@each_family
def test_transformers_4_finds_its_keys(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(kind).save_pretrained(tmp_path / "hf")
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    export_checkpoint(checkpoint, tmp_path / "back", config, None, "fp32", 10**9)
    path = tmp_path / "back" / "config.json"
    expected = loaded_logits(tmp_path / "back", remote=False)
    record = json.loads(path.read_text())
    del record["rope_parameters"], record["dtype"]
    path.write_text(json.dumps(record))
    assert torch.equal(loaded_logits(tmp_path / "back", remote=False), expected)
    _, again = import_folder(monkeypatch, tmp_path / "back", tmp_path / "again")
    assert again.model == config.model


def test_a_head_that_training_moved_is_exported_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("qwen2-tied").save_pretrained(tmp_path / "hf")
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    moved, after = checkpoints.grow(checkpoint, tmp_path / "grown", config, {"vocab_size": 60}, init="random")
    made = export_checkpoint(moved, tmp_path / "back", after, None, "fp32", 10**9)
    assert not made.tied and "lm_head.weight" in load_file(tmp_path / "back" / "model.safetensors")
    tokens = TOKENS[:, :9]
    expected = reference.logits(checkpoints.weights(moved), tokens, dataclasses.asdict(after.model))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.no_grad():
        assert (model(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_layers_without_rotary_embedding_keep_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("smollm3").save_pretrained(tmp_path / "hf")
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConfigError, match="use --depth-placement end"):
        checkpoints.grow(checkpoint, tmp_path / "grown", config, {"num_layers": 6}, depth_init="copy")

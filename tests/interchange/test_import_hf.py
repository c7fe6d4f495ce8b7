"""Models of others become checkpoints that compute the same, continue, grow, and go back as they came."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Before the import: what it keeps of the code of a model goes nowhere else.
os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.saved_run import saved_config
from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.indexed_dataset import IndexedDatasetWriter
from megatron_nexus.data.run_tokenizer import find_tokenizer
from megatron_nexus.growth.checkpoint_tokenizer import tokenizer_record
from megatron_nexus.interchange import import_checkpoint
from megatron_nexus.interchange.export import export_checkpoint
from tests.interchange.test_round_trip import import_folder, run
from tests.support import checkpoints, reference
from tests.support.cli import WARM
from tests.support.paths import REPOSITORY
from tests.support.subprocesses import Spawn

pytestmark = pytest.mark.slow  # the imports of transformers

# Rounding of float64 in sums of at most a hundred terms, over a few layers.
EXACT = 1e-10
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**{**SIZES, "head_dim": 10}),
    "qwen3-tied": Qwen3Config(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
}


def random_model(kind: str) -> PreTrainedModel:
    """A model with random weights, gains included."""
    torch.manual_seed(5)
    # A copy: saving a model writes its type into the configuration.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def logits(checkpoint: Path, config: RunConfig, tokens: Tensor) -> Tensor:
    return reference.logits(checkpoints.weights(checkpoint), tokens, dataclasses.asdict(config.model))


TOKENS = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("float64_hf_models")
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_transformers_and_nothing_is_held_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(kind)
    model.save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(import_checkpoint, "CHUNK_ELEMENTS", 100)
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    with torch.no_grad():
        expected = model.double()(TOKENS).logits
    assert (logits(checkpoint, config, TOKENS) - expected).abs().max() < EXACT
    reader = CheckpointReader(checkpoint)
    reader.verify()
    stored = [chunk for record in reader._index.files for chunk in record.chunks]
    assert max(entry.chunk.box.numel for entry in stored) <= 100
    moments = [checkpoints.tensors(checkpoint, state) for state in ("exp_avg", "exp_avg_sq")]
    assert not any(values.any() for state in moments for values in state.values())
    manifest = read_manifest(checkpoint)
    assert manifest.progress.step == manifest.optimizer.step_count == 0
    assert config.training.seq_length == 64
    assert manifest.lineage[0]["head"] == ("a copy of the embedding" if "tied" in kind else "its own")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_type_and_many_files_are_read(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("qwen3").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    checkpoint, _ = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    expected = model.state_dict()
    found = checkpoints.tensors(checkpoint)
    assert np.array_equal(found["embedding.weight"], expected["model.embed_tokens.weight"].float())
    name = "model.layers.1.self_attn.k_norm.weight"
    assert np.array_equal(found["layers.1.attention.k_norm.gain"], expected[name].float())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_came_in_goes_out_as_it_was(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(kind).save_pretrained(tmp_path / "hf")
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    made = export_checkpoint(checkpoint, tmp_path / "back", config, None, "fp32", 10**9)
    assert made.architecture.model_type == kind and not made.architecture.files
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model("qwen3").save_pretrained(tmp_path / "hf")
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    sizes = {"ffn_hidden_size": 50, "num_layers": 3, "hidden_size": 30}
    larger, after = checkpoints.grow(checkpoint, tmp_path / "grown", config, sizes, depth_init="copy")
    assert (logits(larger, after, TOKENS) - logits(checkpoint, config, TOKENS)).abs().max() < EXACT


def test_it_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawn: Spawn) -> None:
    random_model("llama").save_pretrained(tmp_path / "hf")
    import_folder(monkeypatch, tmp_path / "hf", tmp_path / "run")
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for _ in range(20):
            writer.add_document(rng.integers(0, SIZES["vocab_size"], 100))
    words = "--load run --save new --tp 2 --data-path corpus --split 8,2 --seq-length 16 --train-iters 3"
    words += " --global-batch-size 4 --eval-iters 1 --fp32"
    training = spawn([*WARM, str(REPOSITORY / "pretrain_nexus.py"), *words.split()], tmp_path)
    assert training.end() == 0, training.output()
    manifest = read_manifest(tmp_path / "new" / "iter_0000003")
    assert manifest.optimizer.step_count == 3 and manifest.lineage[0]["model_type"] == "llama"


def test_its_tokenizer_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model("llama").save_pretrained(tmp_path / "hf")
    letters = {chr(i): i - 95 for i in range(97, 123)} | {"<unk>": 0, "</s>": 1}
    words = {"type": "WordLevel", "vocab": letters, "unk_token": "<unk>"}
    end = {"id": 1, "content": "</s>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    record = {"version": "1.0", "added_tokens": [end], "model": words}
    record |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(record))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    monkeypatch.chdir(tmp_path)
    checkpoint, config = import_folder(monkeypatch, tmp_path / "hf", Path("run"))
    found = find_tokenizer(config, tokenizer_record(read_manifest(checkpoint)))
    assert found is not None and found.eod_id == 1 and found.encode("c") == [4]
    assert config.data.tokenizer_model == str(tmp_path / "run" / "tokenizer")
    moved = (tmp_path / "run").rename(tmp_path / "moved") / checkpoint.name
    config = saved_config(moved, read_manifest(moved))
    assert config.data.tokenizer_model == str(tmp_path / "moved" / "tokenizer")


def test_a_tokenizer_that_is_not_the_model_s_can_be_left_out_as_the_refusal_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    random_model("llama").save_pretrained(tmp_path / "hf")
    words = {"type": "WordLevel", "vocab": {str(i): i for i in range(60)}, "unk_token": "0"}
    end = {"id": 1, "content": "1", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    record = {"version": "1.0", "added_tokens": [end], "model": words}
    record |= dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(record))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"eos_token": "1"}')
    flags = ("--input", tmp_path / "hf", "--save", tmp_path / "run")
    assert run(monkeypatch, *flags) == 2
    error = console.readouterr().err
    assert "has 60 tokens, the model 50" in error and "import without it: --no-tokenizer" in error, error
    assert run(monkeypatch, *flags, "--no-tokenizer") == 0
    assert "tokenizer: left out, as --no-tokenizer says" in console.readouterr().out
    assert read_manifest(tmp_path / "run" / "iter_0000000").tokenizer_fingerprint == ""
    assert not (tmp_path / "run" / "tokenizer").exists()


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "scaling": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling 'yarn'"),
    "half a scaling": (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        "llama3 without a number factor",
    ),
    "old scaling": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope scaling 'linear'",
    ),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "window": ({"sliding_window": 4096}, "sliding_window 4096"),
    "layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "kind": ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be imported"),
    "size": ({"hidden_size": None}, "hidden_size is None"),
    "shape": ({"intermediate_size": 44}, "40 x 24 in the files, 44 x 24 in the model"),
    "odd heads": ({"head_dim": 5}, "5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_this_decoder_does_not_compute_is_refused_with_the_reason(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[case]
    random_model("llama").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code = run(monkeypatch, "--input", tmp_path / "hf", "--save", tmp_path / "run")
    error = console.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error, error
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Qwen/Qwen3-0.6B", "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B "),
        ("models/gone.gguf", "--input models/gone.gguf: No such file"),
        ("/models/gone", "give a folder as Hugging Face's save_pretrained writes it, or a .gguf file"),
    ],
)
def test_what_is_not_on_this_disk_is_answered_by_how_to_get_it(
    given: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "--input", given, "--save", "run") == 2
    error = console.readouterr().err
    assert message in error and not list(tmp_path.iterdir()), error
    if "hf download" in error:
        command = Path(sys.executable).with_name("hf")
        usage = subprocess.run([command, "download", "--help"], capture_output=True, text=True, check=True)
        assert "--local-dir" in usage.stdout


def break_extra(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")


def break_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def break_type(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")


def break_end(folder: Path) -> None:
    contents = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(contents[:-4])


def break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors at all")


def break_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").mkdir()
    places = {"lm_head.weight": "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def break_kind(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_extra, "q_proj.bias: in the files, not in the model"),
        (break_missing, "up_proj.weight: nothing in the files, 40 x 24 in the model"),
        (break_type, "lm_head.weight is of the type I8"),
        (break_end, "model.safetensors is not a safetensors file"),
        (break_header, "is not a safetensors file"),
        (break_shard, "a.safetensors cannot be read"),
        (break_kind, "but pytorch_model.bin: pickles are never loaded"),
        (break_config, "is not JSON"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_left(
    damage: "object",
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: pytest.CaptureFixture[str],
) -> None:
    random_model("llama").save_pretrained(tmp_path / "hf")
    damage(tmp_path / "hf")
    code = run(monkeypatch, "--input", tmp_path / "hf", "--save", tmp_path / "run")
    error = console.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error, error
    assert "inv_freq" not in error, "old files of Llama hold it"
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]

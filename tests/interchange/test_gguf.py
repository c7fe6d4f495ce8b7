"""Files of llama.cpp: the next tokens that transformers reads from them, the ids of the tokenizers in them.

The files are written here, as llama.cpp's converter writes them: rows of a Llama's Q and K in its own order,
matrices quantised.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

# Before the import: what it keeps of the code of a model goes nowhere else.
os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGMLQuantizationType as Quantised
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.saved_run import saved_config
from megatron_nexus.cli.main import main
from megatron_nexus.data.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.errors import CheckpointError, DataError
from megatron_nexus.interchange.gguf_file import open_gguf
from megatron_nexus.interchange.gguf_tokenizer import write_gguf_tokenizer
from megatron_nexus.interchange.sentencepiece_model import read_sentencepiece_model
from megatron_nexus.interchange.tokenizer_files import real_lines
from tests.support import checkpoints, reference

pytestmark = pytest.mark.slow  # the imports of transformers

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    # transformers takes heads of a Qwen3 to be of this size, whatever the file says.
    "qwen3": Qwen3Config(**{**SIZES, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
    "model.layers": "blk",
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [text for text, _ in zip(standard_library_documents(), range(80), strict=False)]


def byte_level(documents: list[str], before: list[object], vocab_size: int) -> tokenizers.Tokenizer:
    """A BPE over bytes, of which the first tokens are special."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    return made


def tokenizer_fields(made: tokenizers.Tokenizer, pre: str) -> dict[str, object]:
    """What llama.cpp's converter writes of it."""
    model = json.loads(made.to_str())["model"]
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
    }


def random_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def write_gguf(path: Path, kind: str, matrices: Quantised, fields: dict[str, object]) -> None:
    config = CONFIGS[kind]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"])
    for name, tensor in random_model(kind).state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name and config.model_type == "llama":
                halves = values.reshape(heads, 2, config.head_dim // 2, -1)
                values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if values.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, matrices), raw_dtype=matrices)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "matrices"),
    [
        ("llama", Quantised.Q8_0),
        ("llama-tied", Quantised.Q4_1),
        ("llama", Quantised.F16),
        ("qwen3", Quantised.Q8_0),
    ],
)
def test_next_tokens_are_those_that_transformers_reads_from_the_file(
    kind: str, matrices: Quantised, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = byte_level(documents, [], VOCABULARY)
    write_gguf(tmp_path / "small.gguf", kind, matrices, tokenizer_fields(made, "gpt-2"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    words = ("--input", tmp_path / "small.gguf", "--save", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main("import")
    assert end.value.code == 0
    checkpoint = tmp_path / "run" / "iter_0000000"
    manifest = read_manifest(checkpoint)
    config = saved_config(checkpoint, manifest)
    assert config.preset == "small" and config.model.norm_epsilon == 1e-5
    assert manifest.lineage[0]["format"] == "gguf"
    ours = HuggingFaceTokenizer(tmp_path / "run" / "tokenizer" / "tokenizer.json")
    lines = list(real_lines(documents, 2000))
    assert [ours.encode(line) for line in lines] == [e.ids for e in made.encode_batch(lines)]
    assert [ours.decode(ours.encode(line)) for line in lines] == lines
    tokens = torch.tensor([ours.encode(documents[0])[:40]])
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = reference.logits(checkpoints.weights(checkpoint), tokens, vars(config.model))
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    # Theirs are computed in float32.
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}


@pytest.mark.slow
@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_tokenizers_give_the_ids_of_the_original(
    pre: str, documents: list[str], tmp_path: Path
) -> None:
    made = byte_level(documents, SPLITS[pre], 900)
    write_gguf_tokenizer(tokenizer_fields(made, pre), tmp_path)
    ours = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    lines = [*real_lines(documents, 10_000), "", "  12 345.6\t٣٤ x\r\n\r\n  \u3000é\U0001f600", "I'm you'LL"]
    assert [ours.encode(line) for line in lines] == [e.ids for e in made.encode_batch(lines)]
    assert [ours.decode(ours.encode(line)) for line in lines] == lines
    assert ours.eod_id == 0 and ours.lossless


def test_sentencepiece_tokenizers_give_the_ids_of_the_original(documents: list[str], tmp_path: Path) -> None:
    train_sentencepiece_bpe(documents, tmp_path / "spm.model", 600)
    original, model = SentencePieceTokenizer(tmp_path / "spm.model"), tmp_path / "spm.model"
    pieces = read_sentencepiece_model(model).pieces
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in pieces],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    write_gguf_tokenizer(fields, tmp_path)
    ours = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    lines = list(real_lines(documents, 10_000))
    assert [ours.encode(line) for line in lines] == [original.encode(line) for line in lines]
    assert ours.eod_id == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "somebody"}, "cuts words as 'somebody' does"),
        ({"tokenizer.ggml.model": "bert"}, "is of the kind 'bert'"),
        ({"tokenizer.ggml.eos_token_id": None}, "names no end token"),
        ({"tokenizer.ggml.merges": None}, "has no merges"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(
    change: dict[str, object], message: str, documents: list[str], tmp_path: Path
) -> None:
    fields = tokenizer_fields(byte_level(documents[:5], [], VOCABULARY), "gpt-2")
    with pytest.raises(DataError, match=message):
        write_gguf_tokenizer({**fields, **change}, tmp_path)


@pytest.mark.parametrize("alignment", [0, 24])
@pytest.mark.filterwarnings("ignore:divide by zero")  # of the library
def test_an_alignment_that_is_not_a_power_of_two_is_refused(alignment: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("general.alignment", alignment)
    writer.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="power of two"):
        open_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("contents", "message"),
    [(b"no such thing", "is not a GGUF file"), (b"GGUF", "is not a GGUF file"), (None, "No such file")],
)
def test_a_file_that_is_none_is_refused(
    contents: bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: pytest.CaptureFixture[str],
) -> None:
    if contents is not None:
        (tmp_path / "a.gguf").write_bytes(contents)
    words = ("--input", tmp_path / "a.gguf", "--save", tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main("import")
    error = console.readouterr().err
    assert end.value.code == 2 and message in error and "Traceback" not in error, error
    assert not (tmp_path / "run").exists()

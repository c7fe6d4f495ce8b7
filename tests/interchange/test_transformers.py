"""What transformers makes of an exported checkpoint is the model that was trained.

The reference computes from the equations and shares no code with the package or the exported files. One
file for all that needs transformers: its import takes longer than the tests.
"""

import dataclasses
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

# Before the import: what it keeps of the code of a model goes nowhere else.
os.environ |= {"HF_HOME": tempfile.mkdtemp(), "HF_HUB_OFFLINE": "1"}

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece_bpe
from megatron_nexus.data.standard_library import standard_library_documents
from megatron_nexus.interchange.architecture import NEXUSFORMER, REMOTE_CODE, Architecture
from megatron_nexus.interchange.export import export_checkpoint
from megatron_nexus.interchange.model_card import loading_code
from megatron_nexus.interchange.tokenizer_files import real_lines
from tests.support import checkpoints, reference

pytestmark = pytest.mark.slow  # the imports of transformers

# Rounding of float64 in sums of at most a hundred terms, over a few layers.
EXACT = 1e-10
KINDS: dict[str, dict[str, object]] = {
    "nexusformer": {},
    "inner-norm": {"nexus_inner_norm": True},
    "nexus-output": {"nexus_output_projection": True, "nexus_inner_norm": True},
    "released": {
        "nexus_inner_norm": True,
        "nexus_inner_norm_scale": "width",
        "nexus_output_projection": True,
        "feed_forward": "nexus",
        "ffn_nexus_m": 13,
    },
    "nexus-shared-keys": {"num_query_groups": 1, "qk_layernorm": True},
    "qwen3": {"projection": "linear", "num_query_groups": 1, "qk_layernorm": True, "rotary_base": 1e6},
    "transformer++": {"projection": "linear"},
    "nexified": {"projection": "linear_nexus", "num_query_groups": 1},
    "tokenformer": {
        "projection": "pattention",
        "pattention_slots": 11,
        "feed_forward": "pattention",
        "normalization": "NonParametricLayerNorm",
    },
    "order-2": {"attention_order": 2},
    "order-2-cross": {"attention_order": 2, "num_query_groups": 1, "attention_inner": "cross"},
    "order-3-gated": {"attention_order": 3, "num_query_groups": 1, "attention_gate": True},
    "order-3-shared-keys": {"attention_order": 3, "projection": "linear", "num_query_groups": 1},
}
STOCK = {"qwen3-born": "Qwen3ForCausalLM", "transformer++-born": "LlamaForCausalLM"}
# What does not depend on the kind of projection is shown by a class of transformers', each kind of cache that
# the exported code has, and grown models.
SIX = (
    "qwen3-born",
    "nexusformer-grown",
    "nexus-shared-keys-born",
    "tokenformer-grown",
    "order-2-cross-born",
    "order-3-gated-grown",
)


@dataclasses.dataclass(frozen=True)
class Export:
    """An exported checkpoint: its folder, and what it was made of."""

    folder: Path
    config: RunConfig
    weights: dict[str, Tensor]
    architecture: Architecture

    def load(self, dtype: torch.dtype = torch.float64, **options: object) -> PreTrainedModel:
        """The model as transformers loads it, by code of its own where it has that."""
        kind = {"trust_remote_code": bool(self.architecture.files), "dtype": dtype, **options}
        return AutoModelForCausalLM.from_pretrained(self.folder, **kind).eval()

    def reference_logits(self, tokens: Tensor) -> Tensor:
        """Logits from the equations, float64."""
        return reference.logits(self.weights, tokens, dataclasses.asdict(self.config.model))


def export(root: Path, grows: bool, **options: object) -> Export:
    config = checkpoints.configure(**options)
    source = checkpoints.write_checkpoint(root / "run", config)
    if grows:
        source, config = checkpoints.grow(
            source, root / "grown", config, checkpoints.sizes_for(config, "all")
        )
    made = export_checkpoint(source, root / "hf", config, None, "fp32", 10**9)
    return Export(root / "hf", config, checkpoints.weights(source), made.architecture)


@pytest.fixture(scope="module", params=[f"{kind}-{age}" for kind in KINDS for age in ("born", "grown")])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    kind, _, age = request.param.rpartition("-")
    made = export(tmp_path_factory.mktemp("export"), age == "grown", **KINDS[kind])
    assert made.architecture.class_name == STOCK.get(request.param, NEXUSFORMER.class_name)
    return made


@pytest.mark.usefixtures("float64_hf_models")
def test_logits_are_those_of_the_equations(exported: Export) -> None:
    tokens = checkpoints.sample(exported.config.model)
    expected = exported.reference_logits(tokens)
    # The eager attention of transformers' own classes takes the softmax in float32.
    implementations = ("sdpa", "eager") if exported.architecture.files else ("sdpa",)
    with torch.no_grad():
        for implementation in implementations:
            model = exported.load(attn_implementation=implementation)
            error = (model(tokens).logits - expected).abs().max()
            assert error < EXACT, implementation


@torch.no_grad()
def test_in_float32_they_are_those_of_transformers_as_it_is(exported: Export) -> None:
    tokens = checkpoints.sample(exported.config.model)
    expected = exported.reference_logits(tokens)
    found = exported.load(torch.float32)(tokens).logits
    # Some hundred roundings of 6e-8, of which few add up.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("exported", SIX, indirect=True)
@pytest.mark.usefixtures("float64_hf_models")
def test_a_cache_and_padding_change_nothing(exported: Export) -> None:
    model, tokens = exported.load(), checkpoints.sample(exported.config.model)
    expected = exported.reference_logits(tokens)
    with torch.no_grad():
        begun = model(tokens[:, :4], use_cache=True)
        rest = model(tokens[:, 4:], past_key_values=begun.past_key_values, use_cache=True)
        assert (torch.cat([begun.logits, rest.logits], 1) - expected).abs().max() < EXACT
        for padding in ((3, 0), (0, 3)):  # on the left, on the right
            padded = torch.nn.functional.pad(tokens, padding)
            mask = torch.nn.functional.pad(torch.ones_like(tokens), padding)
            begin, length = padding[0], tokens.shape[1]
            found = model(padded, attention_mask=mask).logits[:, begin : begin + length]
            assert (found - expected).abs().max() < EXACT, f"padding {padding}"


@pytest.mark.parametrize("exported", SIX, indirect=True)
@pytest.mark.usefixtures("float64_hf_models")
def test_generation_is_greedy_decoding_of_the_equations(exported: Export) -> None:
    model = exported.load()
    prompts = checkpoints.sample(exported.config.model)[:, :5]
    expected = prompts
    for _ in range(6):
        last = exported.reference_logits(expected)[:, -1]
        expected = torch.cat([expected, last.argmax(-1, keepdim=True)], dim=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ones = torch.ones_like(prompts)
    assert torch.equal(model.generate(prompts, attention_mask=ones, **settings), expected)
    # The first prompt again in a batch with a shorter one, which is padded on the left.
    short = torch.stack([prompts[0], torch.nn.functional.pad(prompts[1, :3], (2, 0))])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    together = model.generate(short, attention_mask=mask, **settings)
    alone = model.generate(prompts[1:, :3], attention_mask=ones[1:, :3], **settings)
    assert torch.equal(together[0], expected[0])
    assert torch.equal(together[1, 5:], alone[0, 3:])


@pytest.mark.parametrize("exported", SIX, indirect=True)
@pytest.mark.usefixtures("float64_hf_models")
def test_it_trains_and_tells_its_loss(exported: Export) -> None:
    model, tokens = exported.load(), checkpoints.sample(exported.config.model)
    model.activation_checkpointing_enable()
    loss = model.train()(tokens, labels=tokens, use_cache=False).loss
    shifted = reference.loss(
        exported.weights, tokens[:, :-1], tokens[:, 1:], dataclasses.asdict(exported.config.model)
    )
    assert abs(loss.item() - shifted.item()) < 1e-6, "transformers takes the loss in float32"
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("exported", SIX, indirect=True)
def test_what_transformers_saves_again_is_the_same(exported: Export, tmp_path: Path) -> None:
    exported.load(torch.float32).save_pretrained(tmp_path / "again")
    again = dataclasses.replace(exported, folder=tmp_path / "again")
    states = [found.load(torch.float32).state_dict() for found in (exported, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_parts_and_lower_precision_load_alike(tmp_path: Path) -> None:
    whole = export(tmp_path / "whole", grows=False)
    source = tmp_path / "whole" / "run" / "iter_0000040"
    made = export_checkpoint(source, tmp_path / "parts", whole.config, None, "bf16", 3000)
    assert len(made.files) > 3 and (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    parts = dataclasses.replace(whole, folder=tmp_path / "parts").load("auto")
    assert parts.dtype is torch.bfloat16
    rounded = {name: value.bfloat16() for name, value in whole.load(torch.float32).state_dict().items()}
    assert all(torch.equal(value, rounded[name]) for name, value in parts.state_dict().items())


NEWER = {"rope_parameters", "dtype"}
"""Keys of transformers 5, of which transformers 4 reads none."""


@pytest.mark.parametrize("kind", ["qwen3", "transformer++"])
def test_the_keys_of_transformers_4_alone_tell_the_same_model(kind: str, tmp_path: Path) -> None:
    made = export(tmp_path, grows=False, **{**KINDS[kind], "rotary_base": 5e5})
    expected = made.load("auto")(checkpoints.sample(made.config.model)).logits
    path = made.folder / "config.json"
    record = json.loads(path.read_text())
    assert record.keys() >= NEWER
    path.write_text(json.dumps({name: value for name, value in record.items() if name not in NEWER}))
    found = made.load("auto")
    assert found.dtype is torch.float32
    assert torch.equal(found(checkpoints.sample(made.config.model)).logits, expected)


def test_its_code_says_which_transformers_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.utils.output_capturing", None)  # as in transformers 4
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or newer, and this is"):
        runpy.run_path(str(REMOTE_CODE[0]))


@pytest.mark.slow
def test_its_tokenizer_gives_the_ids_of_training(tmp_path: Path) -> None:
    documents = [text for text, _ in zip(standard_library_documents(), range(120), strict=False)]
    train_sentencepiece_bpe(documents, tmp_path / "spm.model", 700)
    trained = SentencePieceTokenizer(tmp_path / "spm.model")
    config = checkpoints.configure(vocab_size=700)
    source = checkpoints.write_checkpoint(tmp_path / "run", config)
    made = export_checkpoint(source, tmp_path / "hf", config, trained, "fp32", 10**9)
    assert "20,000 lines the same ids" in made.tokenizer
    printed: dict[str, object] = {}  # a question would fail: nobody answers it
    exec("\n".join(loading_code(made.architecture, str(tmp_path / "hf"), True)), printed)
    loaded = printed["tokenizer"]
    assert isinstance(loaded, PreTrainedTokenizerBase) and isinstance(printed["model"], PreTrainedModel)
    lines = list(real_lines(documents, 2000))
    texts = ["", "▁ x", "a </s> <unk> <0x0A>\t\r\n\0", "  é \U0001f600  ", "\n\n\n\n    x\n", *lines]
    assert loaded(texts)["input_ids"] == [trained.encode(text) for text in texts]
    assert [loaded.decode(loaded(text)["input_ids"]) for text in texts] == texts
    assert loaded.eos_token_id == loaded.pad_token_id == trained.eod_id
    assert NEXUSFORMER.class_name in (tmp_path / "hf" / "config.json").read_text()

"""Weights that are not finite: refused at the door by tensor and count, and named by every tool."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.verbs import CallVerb

CONFIG = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{f"{LAYER}self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"},
    **{f"{LAYER}mlp.{part}_proj.weight": (12, 8) for part in ("gate", "up")},
    f"{LAYER}mlp.down_proj.weight": (8, 12),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
GAIN, HEAD = f"{LAYER}input_layernorm.weight", "lm_head.weight"


def write_source(folder: Path, dtype: str, wrong: dict[str, list[float]]) -> None:
    """A Llama of ones, but for the first values of some tensors."""
    tensors = {name: np.ones(shape, dtype) for name, shape in SHAPES.items()}
    for name, values in wrong.items():
        tensors[name].reshape(-1)[: len(values)] = values
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_verb: CallVerb) -> CallVerb:
    """Run a verb in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return call_verb


@pytest.mark.parametrize(
    ("dtype", "wrong", "expected"),
    [
        ("float32", {GAIN: [np.nan]}, f"{GAIN}: 1"),
        ("float16", {HEAD: [np.inf, 1.0, -np.inf]}, f"{HEAD}: 2"),
        ("float64", {HEAD: [1e300], GAIN: [np.nan, -1e39]}, f"{GAIN}: 2; {HEAD}: 1"),
    ],
)
def test_an_import_is_refused_by_tensor_and_count(
    dtype: str,
    wrong: dict[str, list[float]],
    expected: str,
    tmp_path: Path,
    run: CallVerb,
) -> None:
    write_source(tmp_path / "hf", dtype, wrong)
    code, output = run("import", "--input hf --save run")
    assert code == 2 and expected in output and "--allow-nonfinite" in output, output
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_was_let_in_is_named_by_every_tool(tmp_path: Path, run: CallVerb) -> None:
    write_source(tmp_path / "hf", "float32", {HEAD: [np.nan, np.inf]})
    code, output = run("import", "--input hf --save run --allow-nonfinite")
    assert code == 0 and f"{HEAD}: 2: written unchanged" in output, output
    code, output = run("inspect", "run --verify")
    assert code == 2 and "head.weight (fp32): 2" in output and "No damage found" in output, output
    code, output = run("upcycle", "--load run --save made --verify")
    assert code == 2 and "its own logits are not finite" in output and "report it" not in output, output
    for verb, words in (
        ("export", "--load run --output made"),
        ("convert", "--load run --save made"),
        ("convert", "--load run --save made --format universal"),
    ):
        code, output = run(verb, words)
        assert code == 2 and "head.weight: 2" in output and not (tmp_path / "made").exists(), output
        code, output = run(verb, words.replace("made", f"let-{len(words)}") + " --allow-nonfinite")
        assert code == 0 and "head.weight: 2: written unchanged" in output, output

"""The command that shows and checks a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.cli.inspect_checkpoint import describe
from megatron_nexus.config.command_line import build
from megatron_nexus.spec.cost import parameter_count
from tests.support import checkpoints
from tests.support.verbs import CallVerb


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("inspect"), checkpoints.configure(), tp=2)


def test_it_tells_what_a_checkpoint_holds_and_finds_it_sound(checkpoint: Path, call_verb: CallVerb) -> None:
    code, output = call_verb("inspect", [checkpoint.parent, "--tensors", "--verify"])
    assert code == 0, output
    specs = read_manifest(checkpoint).specs
    count = parameter_count(specs.values())
    total = sum(path.stat().st_size for path in checkpoint.iterdir())
    for message in (
        f"{checkpoint}, format version",
        "step 40: 160 samples, 4,000 tokens, 1e+09 FLOPs",
        f"{count:,} parameters in ",
        "2 ranks: tensor 2 x pipeline 1 x data 1",
        f"4, {total:,} bytes",
        f"{total:,} bytes",
        "sizes        vocab_size ",
        "tokenizer    none",
        *specs,
    ):
        assert message in output, message


def test_sizes_stand_apart_from_what_layers_compute_and_a_tokenizer_is_where_it_is(checkpoint: Path) -> None:
    saved = open_saved_run(checkpoint)
    config = build({"post_norm": True, "rotary_base": 5e5, "tokenizer_model": "spm.model"})
    lines = describe(replace(saved.manifest, tokenizer_fingerprint=64 * "a"), config)
    assert lines["sizes"].startswith("vocab_size 4,096, num_layers 4, ") and "post_norm" not in lines["sizes"]
    assert "post_norm True" in lines["layers"] and "rotary_base 500000.0" in lines["layers"]
    assert "num_layers" not in lines["layers"] and "qk_layernorm" not in lines["layers"]
    assert lines["tokenizer"] == f"spm.model, sha256 {12 * 'a'} ..."
    built_in = describe(replace(saved.manifest, tokenizer_fingerprint="b"), build({}))
    assert built_in["tokenizer"] == "of the built-in corpus, sha256 b ..."


def test_damage_ends_it_with_the_file_and_the_tensor(checkpoint: Path, call_verb: CallVerb) -> None:
    data = checkpoint / "rank_00001.safetensors"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        code, _ = call_verb("inspect", [checkpoint])
        assert code == 0, "only --verify reads the tensors"
        code, output = call_verb("inspect", [checkpoint, "--verify"])
    finally:
        data.write_bytes(whole)
    assert code == 2, output
    assert f"CheckpointError: {data}: " in output
    assert "(exp_avg_sq) is damaged" in output
    assert "Traceback" not in output


def test_no_checkpoint_is_answered_as_load_answers(tmp_path: Path, call_verb: CallVerb) -> None:
    code, output = call_verb("inspect", [tmp_path])
    assert code == 2
    assert "no complete checkpoint" in output and "holds nothing" in output

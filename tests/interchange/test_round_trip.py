"""An exported Nexusformer comes back through `nexus import` as it was, without transformers."""

import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.checkpoint.saved_run import saved_config
from megatron_nexus.cli.main import main
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.interchange.export import export_checkpoint
from tests.support import checkpoints

COMING_BACK: dict[str, dict[str, object]] = {
    "nexusformer": {"qk_layernorm": True, "nexus_inner_norm": True, "nexus_output_projection": True},
    "nexified": {
        "projection": "linear_nexus",
        "num_query_groups": 1,
        "attention_order": 2,
        "attention_gate": True,
    },
    "released": {
        "nexus_inner_norm": True,
        "nexus_inner_norm_scale": "width",
        "nexus_output_projection": True,
        "feed_forward": "nexus",
        "ffn_nexus_m": 13,
    },
    "tokenformer": {
        "projection": "pattention",
        "pattention_slots": 11,
        "feed_forward": "pattention",
        "normalization": "NonParametricLayerNorm",
        "nexus_m": 0,
        "nexus_a": 0,
    },
}


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main("import")
    assert isinstance(end.value.code, int)
    return end.value.code


def import_folder(monkeypatch: pytest.MonkeyPatch, source: Path, root: Path) -> tuple[Path, RunConfig]:
    """Import through the command; the checkpoint and its configuration."""
    assert run(monkeypatch, "--input", source, "--save", root) == 0
    checkpoint = root / "iter_0000000"
    return checkpoint, saved_config(checkpoint, read_manifest(checkpoint))


@pytest.mark.parametrize(
    "kind", ["nexusformer", *(pytest.param(kind, marks=pytest.mark.law) for kind in list(COMING_BACK)[1:])]
)
def test_an_exported_nexusformer_comes_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = checkpoints.configure(**COMING_BACK[kind])
    source = checkpoints.write_checkpoint(tmp_path / "run", config)
    source, config = checkpoints.grow(
        source, tmp_path / "grown", config, {"hidden_size": 14, "kv_channels": 6}
    )
    export_checkpoint(source, tmp_path / "hf", config, None, "fp32", 10**9)
    checkpoint, again = import_folder(monkeypatch, tmp_path / "hf", tmp_path / "again")
    assert again.model == config.model
    before, after = checkpoints.tensors(source), checkpoints.tensors(checkpoint)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)

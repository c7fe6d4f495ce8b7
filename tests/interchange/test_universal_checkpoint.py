"""Law: DeepSpeed's own engines load the exported universal checkpoint as what was saved, bit for bit."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.cli.main import main
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.decoder import DecoderStage, stage_layers
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard
from tests.support import checkpoints
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.law

# Widths divide by two, as DeepSpeed wants them; the vocabulary, which it pads, does not.
FLAGS = {
    "nexus_m": 16,
    "nexus_a": 20,
    "ffn_hidden_size": 18,
    "seq_length": 12,
    "precision": "fp32",
    "lr": 1e-3,
}
KINDS = {
    "zero1": {},
    "zero1-bf16": {"precision": "bf16"},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def module_names(config: RunConfig, stages: int) -> dict[str, str]:
    """What the engines' own modules call each parameter, by logical name."""
    names = {}
    for stage, layers in enumerate(stage_layers(config.model, config.training.seq_length, stages)):
        module = DecoderStage(config.model, layers, LayerContext(TensorParallel(None), Shard(0, 1), seed=0))
        logical = {id(p): name for name, (_, p) in logical_parameters(module).items()}
        above = "stage" if stages == 1 else str(stage)
        names |= {logical[id(p)]: f"{above}.{theirs}" for theirs, p in module.named_parameters()}
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engines left behind."""
    folder = tmp_path_factory.mktemp("universal")
    config = checkpoints.configure(**FLAGS)
    source = checkpoints.write_checkpoint(folder / "source", config)
    with pytest.MonkeyPatch.context() as patch:
        for stages in (1, 2):
            names = folder / f"names-{stages}.json"
            names.write_text(json.dumps(module_names(config, stages)))
            words = f"--load {source} --save {folder}/universal-{stages} --format universal --names {names}"
            patch.setattr(sys, "argv", ["convert_checkpoint.py", *words.split()])
            with pytest.raises(SystemExit) as ended:
                main("convert")
            assert ended.value.code == 0
    cases = [
        {
            "name": name,
            "flags": {**checkpoints.SIZES, "micro_batch_size": 1, "global_batch_size": 4, **FLAGS, **kind},
            "source": str(source),
            "universal": f"{folder}/universal-{kind.get('pipeline_model_parallel_size', 1)}",
        }
        for name, kind in KINDS.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = TESTS / "training" / "universal_worker.py"
    run_ranks(2, worker, str(folder / "cases.json"), str(folder))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_loads_the_export_bit_for_bit_and_trains_on_from_it(kind: str, folder: Path) -> None:
    source, loaded = folder / "source" / "iter_0000040", folder / kind / "deepspeed" / "iter_0000040"
    for state in STATES:
        expected, found = checkpoints.tensors(source, state), checkpoints.tensors(loaded, state)
        assert expected.keys() == found.keys()
        assert all(np.array_equal(found[name], values) for name, values in expected.items()), state
    ours, theirs = read_manifest(source), read_manifest(loaded)
    assert theirs.optimizer.step_count == ours.optimizer.step_count == checkpoints.STEP
    assert theirs.engine == ours.engine
    for rank in range(2):
        theirs, ours = (
            json.loads((folder / kind / f"{how}_{rank}.json").read_text()) for how in ("deepspeed", "package")
        )
        assert theirs["losses"] == ours["losses"]
        assert theirs["groups"] == ours["groups"]
        assert theirs["iteration"] == checkpoints.STEP


def test_the_layout_is_as_described(folder: Path) -> None:
    root = folder / "universal-1"
    tag = (root / "latest_universal").read_text()
    assert tag == "global_step40"
    config = checkpoints.configure(**FLAGS)
    for theirs in module_names(config, 1).values():
        held = {path.name for path in (root / tag / "zero" / theirs).iterdir()}
        assert held == {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"}
    client = torch.load(root / tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert client["consumed_samples"] == 4 * checkpoints.STEP
    assert client["config"]["model"] == dataclasses.asdict(config.model)

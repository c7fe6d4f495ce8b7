"""Law: training goes on from a grown checkpoint alike at every topology, and as plain AdamW does.

Plain AdamW keeps a count of steps for each element: old ones go on, new ones begin at zero. Growing while
loading gives the same state, bit for bit, as growing with the tool.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nexus.checkpoint.chunks import full_box, index_within
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.config.command_line import build
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import GrowthRequest, read_request
from tests.support import checkpoints, reference
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks
from tests.support.train_worker import STEPS, global_batches

OLD = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "seq_length": 12,
    "precision": "fp32",
    "lr": 1e-2,
    "min_lr": 0.0,
    "lr_warmup_iters": 0,
}
NEXUSFORMER: dict[str, str | int] = {}
TOKENFORMER: dict[str, str | int] = {
    "projection": "pattention",
    "pattention_slots": 21,
    "feed_forward": "pattention",
    "normalization": "NonParametricLayerNorm",
}
COMMON = "vocab_size=41 num_layers=3 hidden_size=14 num_attention_heads=4 kv_channels=6"
SPLIT = f"{COMMON} nexus_m=21 nexus_a=30 attention_order=2 init=split moments=copied".replace(
    "hidden_size=14", "hidden_size=24"
)
SLOTS = f"{COMMON} pattention_slots=30 ffn_hidden_size=33 depth_init=stack moments=copied"
NEW_LR = {"new_lr_ratio": 1.5, "new_lr_warmup_iters": 2}
TOPOLOGIES = {
    2: {
        "zero1": {},
        "zero1-bf16": {"precision": "bf16"},
        "zero2": {"zero_stage": 2},
        "zero3": {"zero_stage": 3},
        "tp2": {"tensor_model_parallel_size": 2},
        "pp2": {"pipeline_model_parallel_size": 2},
    },
    4: {"tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}},
}
# As in test_parity: float32 sums in another order, lifted by Adam where gradients vanish.
LOSS_TOLERANCE = 2e-6
WEIGHT_TOLERANCE = 2e-4


def expected(folder: Path, config: dict, source: RunConfig, request: GrowthRequest) -> dict:
    """What plain AdamW makes of the grown checkpoint, in float32."""
    w, first, second = (
        {n: torch.from_numpy(t) for n, t in checkpoints.tensors(folder, s).items()} for s in STATES
    )
    steps = {name: torch.full_like(t, checkpoints.STEP) for name, t in w.items()}
    for region in read_manifest(folder).optimizer.grown_regions:
        steps[region.tensor][index_within(region.box, full_box(tuple(w[region.tensor].shape)))] = 0.0
    state = {name: (first[name], second[name], steps[name]) for name in w}
    batches = global_batches(config["model"]["vocab_size"], 4, OLD["seq_length"])
    plan, optimizer = plan_growth(source, request), config["optimizer"]

    def lr_factors(step: int) -> dict[str, torch.Tensor]:
        factors = {name: torch.ones_like(t) for name, t in w.items()}
        for name, tensor in plan.tensors.items():
            for part in tensor.boxes:
                if part.is_new:
                    within = index_within(part.box, full_box(tensor.spec.shape))
                    warmed = min(1.0, step / max(1, optimizer["new_lr_warmup_iters"]))
                    factors[name][within] = optimizer["new_lr_ratio"] * warmed
        return factors

    return reference.train(w, batches, config, state=state, lr_factors=lr_factors)


@pytest.mark.law
@pytest.mark.parametrize(
    ("ranks", "family", "growth", "new_lr"),
    [
        (2, NEXUSFORMER, SPLIT, NEW_LR),
        (4, NEXUSFORMER, f"{COMMON} nexus_m=21 nexus_a=30", {}),
        (2, TOKENFORMER, SLOTS, NEW_LR),
    ],
    ids=["nexusformer-2", "nexusformer-4", "tokenformer-2"],
)
def test_training_goes_on_as_plain_adamw_at_every_topology(
    ranks: int, family: dict[str, str | int], growth: str, new_lr: dict[str, float], tmp_path: Path
) -> None:
    config = checkpoints.configure(**OLD, **family)
    source = checkpoints.write_checkpoint(tmp_path / "source", config, tp=2)
    request = read_request(growth)
    sizes, settings = dict(request.sizes), vars(request.settings)
    made, after = checkpoints.grow(source, tmp_path / "grown", config, sizes, tp=2, **settings)
    flags = {**vars(after.model), **OLD, **sizes, **new_lr, "micro_batch_size": 1, "global_batch_size": 4}
    cases = [
        {"name": name, "flags": {**flags, **topology}, **start}
        for i, (name, topology) in enumerate(TOPOLOGIES[ranks].items())
        # By turns from the tool's checkpoint and growing while loading.
        for start in ([{"load": str(made)}, {"load": str(source), "grow": growth}][i % 2],)
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_ranks(ranks, TESTS / "support" / "train_worker.py", str(tmp_path / "cases.json"), str(tmp_path))
    plain = expected(made, dataclasses.asdict(build(flags)), config, request)
    tool = {state: checkpoints.tensors(made, state) for state in STATES}
    for case in cases:
        name, folder = case["name"], tmp_path / case["name"]
        assert read_manifest(folder / "iter_0000000").optimizer == read_manifest(made).optimizer, name
        for state in STATES:
            loaded = checkpoints.tensors(folder / "iter_0000000", state)
            assert all(np.array_equal(loaded[key], values) for key, values in tool[state].items()), name
        records = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
        if case["flags"]["precision"] == "bf16":
            assert records[0]["losses"] == pytest.approx(plain["losses"], abs=2e-2)
            continue
        assert records[0]["losses"] == pytest.approx(plain["losses"], abs=LOSS_TOLERANCE), name
        assert all(record["padding"] == 0.0 for record in records)
        ended = checkpoints.tensors(folder / f"iter_{STEPS:07d}")
        for key, weights in plain["weights"].items():
            assert np.abs(ended[key] - weights.detach().numpy()).max() <= WEIGHT_TOLERANCE, (name, key)

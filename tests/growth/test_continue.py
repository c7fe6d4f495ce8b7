"""Law: training goes on from a grown checkpoint alike at every topology, and as plain AdamW does.

Plain AdamW keeps a count of steps for each element: old ones go on, new ones begin at zero. Growing while
loading gives the same state, bit for bit, as growing with the tool.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nexus.checkpoint.chunks import full_box, index_within
from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import GrownRegion, read_manifest
from megatron_nexus.checkpoint.train_state import StateView
from megatron_nexus.config.command_line import build
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.growth.plan import plan_growth
from megatron_nexus.growth.request import GrowthRequest, read_request
from megatron_nexus.spec.param import Axis, Flow, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Box
from megatron_nexus.training.grown_adam import install_bias_correction
from megatron_nexus.training.new_lr import install_new_lr, new_lr_factor
from tests.support import checkpoints, reference
from tests.support.batches import STEPS, global_batches
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.law

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
        "zero1-cpu-adam": {"optimizer_impl": "deepspeed"},
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


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW that counts its steps by parameter group, as apex's FusedAdam does, which runs on CUDA alone."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = count = group.get("step", 0) + 1
            for flat in group["params"]:
                state = self.state[flat]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
                first, second = group["betas"]
                m = state["exp_avg"].lerp_(flat.grad, 1 - first)
                v = state["exp_avg_sq"].mul_(second).addcmul_(flat.grad, flat.grad, value=1 - second)
                update = m / (1 - first**count) / ((v / (1 - second**count)).sqrt() + group["eps"])
                flat.sub_(group["lr"] * (update + group["weight_decay"] * flat))


@dataclasses.dataclass
class OneBuffer:
    """What grown weights need of `ZeroState`: a tensor in one buffer, and its optimizer's hooks."""

    flat: torch.nn.Parameter
    adam: torch.optim.Optimizer

    def views(self) -> list[StateView]:
        spec = ParamSpec("w", (Axis("x", len(self.flat)),), Normal(0.02), Role.VECTOR, (Flow.WRITES,))
        state = self.adam.state[self.flat]
        values = {"fp32": self.flat.detach(), **{name: state[name] for name in STATES[1:]}}
        return [StateView(spec, full_box(spec.shape), values)]

    def around_each_step(self, before: Callable = lambda *_: None, after: Callable = lambda *_: None) -> None:
        self.adam.register_step_pre_hook(before)
        self.adam.register_step_post_hook(after)


@pytest.mark.parametrize("counts_by_group", [True, False])
def test_new_weights_have_their_rate_and_count_under_an_adam_that_counts_by_group(
    counts_by_group: bool,
) -> None:
    """Old and new weights in one buffer end as two AdamWs would have them, one of each kind."""
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    gradients = torch.randn(8, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old, new = (torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64)) for _ in range(2))
    apart = [torch.optim.AdamW([old], **settings), torch.optim.AdamW([new], **settings)]
    flat = torch.nn.Parameter(torch.cat([old.detach(), new.detach()]))
    adam = GroupStepAdam([flat], settings) if counts_by_group else torch.optim.AdamW([flat], **settings)
    optimizer = build({"new_lr_ratio": 1.5, "new_lr_warmup_iters": 3}).optimizer
    for step, gradient in enumerate(gradients):
        flat.grad, old.grad, new.grad = gradient.clone(), gradient[:5].clone(), gradient[5:].clone()
        if step == 3:  # where the last five begin, as those of a growth do: no moments
            state = adam.state[flat]
            state["exp_avg"][5:] = state["exp_avg_sq"][5:] = 0.0
            regions = [GrownRegion("w", Box((5,), (5,)), adam_step=3)]
            install_bias_correction(OneBuffer(flat, adam), regions)
            install_new_lr(OneBuffer(flat, adam), regions, optimizer)
        apart[0].step()
        if step >= 3:
            apart[1].param_groups[0]["lr"] = settings["lr"] * new_lr_factor(optimizer, step - 2)
            apart[1].step()
        else:
            flat.grad[5:] = 0.0
        adam.step()
        if step < 3:
            with torch.no_grad():
                flat[5:] = new
    assert torch.allclose(flat.detach(), torch.cat([old, new]).detach(), atol=1e-12, rtol=0)

"""Law: growth metrics are those of whole gradients, weights and activations, at every topology.

Compared with plain PyTorch in one process: new elements follow from the sizes before the growth, ranks come
from a singular value decomposition, activations from the equations. And training does not notice.
"""

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_nexus.checkpoint.data_file import STATES
from megatron_nexus.checkpoint.manifest import read_manifest
from megatron_nexus.config.command_line import build
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.nexus_rank import NexusRank, NexusWidths, nexus_rank_specs
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import Axis, Normal
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.grown_elements import grown_elements
from megatron_nexus.training.matrix_statistics import MATRIX_NUMBERS, RANKS_SIDE, source_numbers
from megatron_nexus.training.matrix_statistics import matrix_numbers as numbers_of
from tests.support import checkpoints, reference
from tests.support.batches import STEPS, global_batches
from tests.support.ranks import run_ranks

WORKER = Path(__file__).with_name("growth_metrics_worker.py")
SIZES = {
    "num_layers": 3,
    "hidden_size": 14,
    "ffn_hidden_size": 23,
    "nexus_m": 21,
    "nexus_a": 30,
    "vocab_size": 41,
}
# Of each axis that grows, its size before; the third layer is new, a copy of the first.
OLD_SIZES = {"vocabulary": 37, "hidden": 12, "ffn": 17, "nexus_m": 15, "nexus_a": 19}
TRAINING = {
    "seq_length": 12,
    "precision": "fp32",
    "lr": 1e-2,
    "min_lr": 0.0,
    "lr_warmup_iters": 0,
    "adam_eps": 1e-6,
    "ddp_bucket_size": 1000,
    "growth_metrics_interval": 2,
}
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TOPOLOGIES: dict[int, dict[str, dict[str, object]]] = {
    1: {"one": {}},
    2: {
        "tp2": {**TENSOR, "sequence_parallel": True, "padding_multiple": 4},
        "pp2": {**PIPELINE, "micro_batch_size": 2},
        "zero1": {},
        "zero2": {"zero_stage": 2},
        "zero3": {"zero_stage": 3, "recompute_granularity": "selective"},
        "bf16": {"precision": "bf16"},
    },
    4: {"tp2-zero3": {**TENSOR, "zero_stage": 3}},
}
UNNOTICED = ("tp2", "pp2", "zero3")
"""Topologies that are trained without metrics, too."""
# Against float64: gradients of two gains are 5 % of the others', and right to 1e-3 in float32.
TOLERANCE = 2e-3
# Of float32 sums in another order, lifted by Adam where gradients vanish.
ORDER_TOLERANCE = 2e-4
# Means of many rounded products; gradients of a single small tensor by up to 5 %.
BF16_TOLERANCE = 0.1


@cache
def runs(ranks: int) -> tuple[dict[str, list[dict]], dict[str, dict[str, float]]]:
    """What each rank has recorded of each topology, and what plain PyTorch finds at step 2."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        config = checkpoints.configure(seq_length=12)
        source = checkpoints.write_checkpoint(root / "source", config)
        made, after = checkpoints.grow(
            source, root / "grown", config, SIZES, init="in_rand", depth_init="stack", moments="kept"
        )
        flags = {**vars(after.model), **TRAINING, "micro_batch_size": 1, "global_batch_size": 4}
        cases = [
            {"name": f"{name}{suffix}", "flags": {**flags, **topology, **more}, "load": str(made)}
            for name, topology in TOPOLOGIES[ranks].items()
            for suffix, more in (("", {}), ("-without", {"growth_metrics_interval": 0}))
            if not suffix or name in UNNOTICED
        ]
        (root / "cases.json").write_text(json.dumps(cases))
        run_ranks(ranks, WORKER, str(root / "cases.json"), folder)
        records = {
            case["name"]: [json.loads((root / f"{case['name']}-{r}.json").read_text()) for r in range(ranks)]
            for case in cases
        }
        return records, expected(made, dataclasses.asdict(build(flags)))


def expected(folder: Path, config: dict) -> dict[str, dict[str, float]]:
    """The metrics of step 2 from whole tensors."""
    w, first, second = (
        {n: torch.from_numpy(t).double() for n, t in checkpoints.tensors(folder, s).items()} for s in STATES
    )
    specs = read_manifest(folder).specs
    new = {name: new_units(name, specs[name].axes) for name in w}
    is_new = {name: _elements(masks) for name, masks in new.items()}
    state = {
        name: (first[name], second[name], torch.where(is_new[name], 0.0, float(checkpoints.STEP)))
        for name in w
    }
    one, two, _ = global_batches(config["model"]["vocab_size"], 4, TRAINING["seq_length"])
    before = {n: t.detach() for n, t in reference.train(w, [one], config, state=state)["weights"].items()}
    step = reference.train(before, [two], config, state=state)
    clip = min(1.0, config["optimizer"]["clip_grad"] / (step["norms"][0] + 1e-6))
    ended = {name: t.detach() for name, t in step["weights"].items()}
    found: dict[str, dict[str, float]] = {}
    for name, weights in before.items():
        own = found[name] = {}
        gradient, update = clip * step["first_gradients"][name], ended[name] - weights
        for side, mask in (("old", ~is_new[name]), ("new", is_new[name])):
            if mask.any():
                own[f"elements_{side}"] = float(mask.sum())
                for kind, values in (("grad", gradient), ("weight", weights), ("update", update)):
                    own[f"{kind}_rms_{side}"] = rms(values[mask])
                own[f"update_ratio_{side}"] = own[f"update_rms_{side}"] / own[f"weight_rms_{side}"]
        if {"grad_rms_old", "grad_rms_new"} <= own.keys():
            own["grad_ratio"] = own["grad_rms_new"] / own["grad_rms_old"]
        if weights.dim() == 2:
            own |= matrix_numbers(ended[name].numpy(), *(mask.numpy() for mask in new[name]))
            if name.startswith("layers.2."):
                axis = specs[name].axes[0]
                rows = OLD_SIZES.get(axis.name.split(".")[-1], axis.size)
                pair = ended[name][:rows], ended[name.replace("layers.2.", "layers.0.")][:rows]
                cosines = torch.nn.functional.cosine_similarity(*pair, dim=1)
                own |= {
                    "source_cosine_mean": float(cosines.mean()),
                    "source_cosine_min": float(cosines.min()),
                }
    for name, (pre, post) in activations(ended, one[0], config["model"]).items():
        for side, mask in (("old", ~new[name][1]), ("new", new[name][1])):
            if mask.any():
                dead = (post[..., mask].abs() < 1e-6).flatten(0, -2).all(dim=0)
                found[name] |= {
                    f"units_{side}": float(mask.sum()),
                    f"pre_rms_{side}": rms(pre[..., mask]),
                    f"post_rms_{side}": rms(post[..., mask]),
                    f"dead_share_{side}": float(dead.double().mean()),
                }
    return found


def rms(values: Tensor) -> float:
    return math.sqrt(float((values**2).mean()))


def new_units(name: str, axes: tuple[Axis, ...]) -> list[Tensor]:
    inserted = name.startswith("layers.2.")
    return [
        torch.arange(a.size) >= (0 if inserted else OLD_SIZES.get(a.name.split(".")[-1], a.size))
        for a in axes
    ]


def _elements(masks: list[Tensor]) -> Tensor:
    return masks[0] if len(masks) == 1 else masks[0][:, None] | masks[1][None, :]


def matrix_numbers(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> dict[str, float]:
    made: dict[str, float] = {}
    parts = {"": matrix, "_old": matrix[~rows][:, ~columns]}
    parts["_new"] = matrix[rows] if rows.any() else matrix[:, columns]
    for name, part in parts.items():
        if part.size:
            s = np.linalg.svd(part, compute_uv=False)
            p = s / s.sum()
            made[f"stable_rank{name}"] = (s**2).sum() / s[0] ** 2
            made[f"effective_rank{name}"] = math.exp(-(p * np.log(p)).sum())
    for side, vectors, mask in (("row", matrix, rows), ("column", matrix.T, columns)):
        if mask.any() and not mask.all():
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            cosines = np.abs(unit[mask] @ unit[~mask].T).max(axis=1)
            made |= {f"{side}_cosine_max": cosines.max(), f"{side}_cosine_mean": cosines.mean()}
    return made


def activations(w: dict[str, Tensor], tokens: Tensor, model: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Units before and after each activation, by the matrix that reads them."""
    found = {}
    x = w["embedding.weight"][tokens]
    for i in range(model["num_layers"]):
        a, f = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        y = reference.norm(x, w, f"{a}.norm", model)
        for p in "qkv":
            m = y @ w[f"{a}.{p}.w_m"].T
            found[f"{a}.{p}.w_a"] = m, reference.gelu(m)
            h = reference.gelu(m) @ w[f"{a}.{p}.w_a"].T
            found[f"{a}.{p}.w_d"] = h, reference.gelu(h)
        x = x + reference.attention(y, w, a, model)
        y = reference.norm(x, w, f"{f}.norm", model)
        gate = y @ w[f"{f}.gate"].T
        found[f"{f}.down"] = gate, torch.nn.functional.silu(gate) * (y @ w[f"{f}.up"].T)
        x = x + reference.feed_forward(y, w, f, model)
    return found


@pytest.mark.law
@pytest.mark.parametrize("ranks", TOPOLOGIES)
def test_metrics_are_those_of_whole_tensors_at_every_topology(ranks: int) -> None:
    records, plain = runs(ranks)
    for name in TOPOLOGIES[ranks]:
        for record in records[name]:  # all ranks have them, the first writes
            (found,) = record["found"]
            assert found["step"] == 2
            assert found["growth_metrics"].keys() == plain.keys()
            for tensor, numbers in found["growth_metrics"].items():
                assert numbers.keys() == plain[tensor].keys(), (name, tensor)
                tolerance = BF16_TOLERANCE if name == "bf16" else TOLERANCE
                assert numbers == pytest.approx(plain[tensor], rel=tolerance), (name, tensor)


@pytest.mark.law
@pytest.mark.parametrize("ranks", [2, 4])
def test_topologies_differ_by_the_order_of_sums(ranks: int) -> None:
    one = runs(1)[0]["one"][0]["found"][0]["growth_metrics"]
    for name in TOPOLOGIES[ranks]:
        found = runs(ranks)[0][name][0]["found"][0]["growth_metrics"]
        for tensor, numbers in found.items() if name != "bf16" else ():
            assert numbers == pytest.approx(one[tensor], rel=ORDER_TOLERANCE), (name, tensor)


@pytest.mark.law
@pytest.mark.parametrize("name", UNNOTICED)
def test_training_does_not_notice(name: str) -> None:
    records, _ = runs(2)
    assert len(records[name][0]["losses"]) == STEPS
    assert records[name][0]["losses"] == records[f"{name}-without"][0]["losses"]


def test_ranks_of_large_matrices_are_found_in_the_first_measurement_of_ten() -> None:
    matrix = torch.randn(RANKS_SIDE + 1, RANKS_SIDE + 2, generator=torch.Generator().manual_seed(1))
    none = [torch.zeros(side, dtype=torch.bool) for side in matrix.shape]
    for with_ranks in (True, False):
        found = dict(zip(MATRIX_NUMBERS, numbers_of(matrix, *none, with_ranks), strict=True))
        assert math.isfinite(found["effective_rank"]) is with_ranks
    small = numbers_of(matrix[:RANKS_SIDE], none[0][:RANKS_SIDE], none[1], with_ranks=False)
    assert math.isfinite(small[MATRIX_NUMBERS.index("stable_rank")])


def test_rows_that_split_has_copied_are_compared_with_their_sources(tmp_path: Path) -> None:
    """As they are born: incoming weights of a copied unit are those of its source, whatever axes grow."""
    config = checkpoints.configure()
    source = checkpoints.write_checkpoint(tmp_path / "old", config)
    sizes = {"nexus_m": 18, "nexus_a": 22, "ffn_hidden_size": 20, "num_layers": 3}
    made, after = checkpoints.grow(source, tmp_path / "new", config, sizes, init="split", depth_init="stack")
    found = grown_elements(after.model, read_manifest(made).lineage)
    tensors = {name: torch.from_numpy(t) for name, t in checkpoints.tensors(made, STATES[0]).items()}
    copied = {name: of for name, of in found.items() if of.source}
    assert {"layers.0.attention.q.w_m", "layers.1.attention.k.w_a", "layers.2.feed_forward.down"} <= set(
        copied
    )
    assert "layers.0.attention.q.w_d" not in copied  # its new units are columns
    for name, of in copied.items():
        rows = sum(count for _, count, _ in of.copies)
        assert rows == (len(tensors[name]) if name.startswith("layers.2.") else int(of.new_units(0).sum()))
        numbers = source_numbers(tensors[name], tensors[of.source], of.copies)
        assert numbers == pytest.approx([1.0, 1.0], abs=1e-6), name


def test_products_of_several_projections_at_once_show_the_same_activations() -> None:
    """On a GPU and under --compile the Nexus-Ranks of one input share their products."""
    hidden, width = Axis("hidden", 6, residual=True), Axis("attention", 8)
    widths, seen = NexusWidths(10, 14), []
    names = ("q", "k", "v")
    specs = {name: nexus_rank_specs(name, hidden, width, widths, Normal(0.02)) for name in names}
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    for grouped in (False, True):
        context = LayerContext(TensorParallel(None), Shard(0, 1), seed=3, group_projections=grouped)
        module, reports = NexusRank(specs, widths, context), {}
        attributes = {id(parameter): name for name, parameter in module.named_parameters()}
        context.observer.callback = lambda reader, before, after, r=reports, a=attributes: r.update(
            {a[id(reader)]: (before, after)}
        )
        module(x)
        seen.append(reports)
    single, together = seen
    assert single.keys() == together.keys() == {f"{name}_{part}" for name in names for part in ("w_a", "w_d")}
    for name, pair in single.items():
        for one, other in zip(pair, together[name], strict=True):
            assert torch.allclose(one, other, atol=1e-6), name

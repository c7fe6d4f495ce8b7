"""Law: at every topology, ZeRO stage and option, training equals plain PyTorch in one process.

Compared with `reference`, which shares no code with the package: three losses and gradient norms, every
gradient of the first step, the loss of an evaluation and every weight at the end. The gradients are read
from the checkpoint of step 1, where Adam's first moment is (1 - beta1) x the clipped gradient: so the law
holds for `nexus train`, from the engines to the stored pieces.
"""

import dataclasses
import itertools
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_nexus.checkpoint.store import CheckpointReader
from megatron_nexus.config.command_line import build
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.models.decoder import decoder_specs
from megatron_nexus.models.scores import Request
from megatron_nexus.spec.initialise import local_values
from megatron_nexus.spec.shard import Box, Shard
from tests.support import reference
from tests.support.batches import STEPS, document_positions, global_batches, scoring_requests
from tests.support.paths import TESTS
from tests.support.ranks import run_ranks

# M, A, the feed-forward and the vocabulary divide by no tensor-parallel size; gradients are clipped.
FLAGS = {
    "vocab_size": 61,
    "num_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "kv_channels": 6,
    "ffn_hidden_size": 27,
    "nexus_m": 19,
    "nexus_a": 23,
    "seq_length": 12,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "precision": "fp32",
    "lr": 1e-3,
    "min_lr": 0.0,
    "lr_warmup_iters": 0,
    "init_method_std": 0.2,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "adam_eps": 1e-6,
    "ddp_bucket_size": 1000,  # several buckets, more on one pipeline stage than on another
}
PACKED = {"reset_position_ids": True, "reset_attention_mask": True}
OPTIONS = {"nexus_inner_norm": True, "nexus_output_projection": True}
FAMILIES = {
    "qwen3": {"projection": "linear", "num_query_groups": 2, "qk_layernorm": True, "no_rope_freq": 2},
    "qwen2": {
        "projection": "linear",
        "num_query_groups": 2,
        "add_qkv_bias": True,
        "use_rope_scaling": True,
        "original_max_position_embeddings": 12,
        "sliding_window": 5,
    },
    "olmo2": {
        "projection": "linear",
        "num_query_groups": 2,
        "qk_layernorm": True,
        "qk_layernorm_all_heads": True,
        "post_norm": True,
    },
    "order2": {"attention_order": 2, "num_query_groups": 2},
    "order3-cross": {"attention_order": 3, "num_query_groups": 2, "attention_inner": "cross"},
    "order2-gated": {"attention_order": 2, "num_query_groups": 2, "attention_gate": True},
    "released": {
        "nexus_inner_norm": True,
        "nexus_inner_norm_scale": "width",
        "nexus_output_projection": True,
        "feed_forward": "nexus",
        "ffn_nexus_m": 21,
    },
    "tokenformer": {
        "projection": "pattention",
        "pattention_slots": 21,
        "feed_forward": "pattention",
        "normalization": "NonParametricLayerNorm",
    },
}

# float32: sums of up to a few hundred terms in another order differ by about 1e-6 of the largest. Adam
# divides by the root of the second moment, which lifts the rounding of elements whose gradient is near zero:
# hence the large epsilon above. The third norm of the released family is then 4e-6 from float64's in plain
# PyTorch and 5e-6 here, on a CPU of 2023: to either side of it.
LOSS_TOLERANCE = 2e-6
NORM_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 2e-5
# bf16 has 8 bits: each product is right to 2^-9, so loss and gradients of a few layers to 1 or 2 %. Adam
# turns the rounding of small gradients into whole steps of the weights, which moves later norms by up to 2 %.
BF16_TOLERANCE = 3e-2
BF16_NORM_TOLERANCE = 5e-2


def _variants(tp: int, pp: int, dp: int) -> dict[str, dict]:
    """The options, families of models and recomputations, at one topology."""
    top = 3 if pp == 1 and tp * dp > 1 else 1
    full = {"recompute_granularity": "full", "zero_stage": top, "padding_multiple": 4}
    layout = {"zero_stage": top, "sequence_parallel": tp > 1}
    made = {
        "options": OPTIONS,
        "packed": {**PACKED, "recompute_granularity": "full"},
        "selective": {"recompute_granularity": "selective"},
        "bf16": {"precision": "bf16"},
        f"full-zero{top}": full,
        **{family: {**fields, **layout} for family, fields in FAMILIES.items()},
    }
    if tp > 1:
        made["sequence"] = {**OPTIONS, "sequence_parallel": True}
        made["packed-sequence"] = {**PACKED, "sequence_parallel": True}
        made[f"sequence-full-zero{top}"] = {**full, "sequence_parallel": True}
    return made


def _cases(world: int) -> dict[str, dict]:
    """Every (tp, pp, dp) in {1, 2}^3 of this world size, every ZeRO stage it allows, and the variants.

    One rank shows each variant alone, tp 2 x pp 2 half of them and tp 2 x dp 2 the others, two ranks what is
    then missing: so each variant is shown with each axis, and ZeRO 3 with each family at dp 2. bf16 is shown
    everywhere, sequence parallelism wherever tensor parallelism is. ZeRO 0 is served as 1.
    """
    topologies = [t for t in itertools.product((1, 2), repeat=3) if math.prod(t) == world]
    made = {}
    for place, (tp, pp, dp) in enumerate(topologies):
        numbers = ((0, 1, 2, 3) if pp == 1 else (0, 1))[world == 4 :]
        stages = {f"zero{stage}": {"zero_stage": stage} for stage in numbers}
        every = _variants(tp, pp, dp)
        if world == 1:
            variants = every
        elif world == 2 and tp == 2:  # the others are shown with it by four ranks
            variants = {
                name: fields for name, fields in every.items() if "sequence" in name or name == "bf16"
            }
        else:
            variants = {
                name: fields
                for turn, (name, fields) in enumerate(every.items())
                if name == "bf16" or ((turn + place) % 2 == 0 and (tp, pp, dp) != (1, 2, 2))
            }
        layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        if pp == dp == 1:  # a pipeline of two stages is full with four micro-batches only
            layout["micro_batch_size"] = 2
        if (tp, pp, dp) == (2, 1, 1):  # with collectives in the graph; a compilation takes long
            variants["compiled"] = {"compile": True, "recompute_granularity": "selective"}
        if tp == pp and dp == 1:
            variants["linear-loss"] = {"cross_entropy_fusion_impl": "linear", "sequence_parallel": tp > 1}
        for name, fields in (stages | variants).items():
            made[f"tp{tp}-pp{pp}-dp{dp}-{name}"] = {**FLAGS, **layout, **fields}
    if world == 4:  # two nodes of two ranks
        for precision in ("fp32", "bf16"):
            made[f"dp4-{precision}-by-node"] = {
                **FLAGS,
                "precision": precision,
                "hierarchical_grad_reduce": True,
            }
    return made


def _whole(config: RunConfig) -> dict[str, Tensor]:
    specs = decoder_specs(config.model)
    return {name: local_values(spec, Shard(0, 1), config.training.seed) for name, spec in specs.items()}


def _positions(packed: bool) -> Tensor | None:
    return document_positions(FLAGS["global_batch_size"], FLAGS["seq_length"]) if packed else None


@cache
def _reference(model: ModelConfig, packed: bool) -> dict:
    config = dataclasses.replace(build(FLAGS), model=model)
    batches = global_batches(config.model.vocab_size, config.training.global_batch_size, FLAGS["seq_length"])
    return reference.train(_whole(config), batches, dataclasses.asdict(config), _positions(packed))


def _tensor(reader: CheckpointReader, name: str, state: str) -> Tensor:
    shape = reader.manifest.specs[name].shape
    return torch.from_numpy(reader.read_box(name, state, Box((0,) * len(shape), shape)))


def _asks_every_last_token(name: str) -> bool:
    return name.endswith("-zero1")


def _check(folder: Path, flags: dict, world: int) -> None:
    packed = "reset_attention_mask" in flags
    expected = _reference(build(flags).model, packed)
    records = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(world)]
    bf16 = flags["precision"] == "bf16"
    loss_tolerance = BF16_TOLERANCE if bf16 else LOSS_TOLERANCE
    norm_tolerance = BF16_NORM_TOLERANCE if bf16 else NORM_TOLERANCE
    for record in records:
        assert record["losses"] == pytest.approx(expected["losses"], abs=loss_tolerance)
        assert record["norms"] == pytest.approx(expected["norms"], rel=norm_tolerance)
        assert record["padding"] == 0.0
        assert record["marks_per_micro_batch"] == 1.0, "a long evaluation is seen to go on, on every stage"
        assert record["losses"] == records[0]["losses"], "every rank reports the same loss"
    first, last = CheckpointReader(folder / "iter_0000001"), CheckpointReader(folder / f"iter_{STEPS:07d}")
    clip = min(1.0, FLAGS["clip_grad"] / (expected["norms"][0] + 1e-6))
    assert clip < 1.0, "the case must clip to tell whether clipping is right"
    assert set(first.manifest.specs) == set(expected["weights"])
    largest = max(float(g.abs().max()) for g in expected["first_gradients"].values())
    for name, gradient in expected["first_gradients"].items():
        mine = _tensor(first, name, "exp_avg") / (1.0 - 0.9) / clip
        tolerance = (BF16_TOLERANCE if bf16 else GRADIENT_TOLERANCE) * largest
        assert float((mine - gradient).abs().max()) <= tolerance, f"gradient of {name}"
        # A bias of keys moves all scores of a query alike where channels hardly turn: its gradient is
        # rounding there, of which Adam makes whole steps.
        if not bf16 and not name.endswith("k.bias"):
            difference = _tensor(last, name, "fp32") - expected["weights"][name].detach()
            assert float(difference.abs().max()) <= WEIGHT_TOLERANCE, name
    w = {name: _tensor(last, name, "fp32") for name in expected["weights"]}
    batches = global_batches(FLAGS["vocab_size"], FLAGS["global_batch_size"], FLAGS["seq_length"])
    model = dataclasses.asdict(build(flags).model)
    evaluation = reference.loss(w, *batches[0], model, _positions(packed)).item()
    assert records[0]["evaluation"] == pytest.approx(evaluation, abs=loss_tolerance)
    assert math.isfinite(evaluation)
    requests = scoring_requests(FLAGS["vocab_size"], FLAGS["seq_length"], _asks_every_last_token(folder.name))
    _check_scores(requests, records[0]["scores"]["all"][""], w, model, loss_tolerance, greedy=not bf16)


def _check_scores(
    requests: list[Request], found: list, w: dict[str, Tensor], model: dict, tolerance: float, greedy: bool
) -> None:
    """Log-likelihoods of the ends of texts, to the loss' tolerance for each token, and what is likeliest."""
    assert len(found) == len(requests)

    @cache
    def log_p_TV(*context: int) -> Tensor:
        return reference.logits(w, torch.tensor([context]), model)[0].log_softmax(-1)

    for request, (log_p, is_greedy) in zip(requests, found, strict=True):
        tokens, count = request.context + request.continuation, len(request.continuation)
        log_p_KV = log_p_TV(*tokens[:-1])[-count:]
        ends = torch.tensor(tokens[-count:])
        assert log_p == pytest.approx(float(log_p_KV.gather(1, ends[:, None]).sum()), abs=count * tolerance)
        if greedy:
            assert is_greedy == bool((log_p_KV.argmax(1) == ends).all())
    if len(found) > FLAGS["vocab_size"]:  # every last token was asked
        assert sum(is_greedy for _, is_greedy in found[-FLAGS["vocab_size"] :]) == 1


@pytest.mark.law
@pytest.mark.parametrize("world", [1, 2, 4])
def test_training_equals_plain_pytorch_at_every_topology(world: int, tmp_path: Path) -> None:
    cases = _cases(world)
    listed = [
        {"name": name, "flags": flags, "every_last_token": _asks_every_last_token(name)}
        for name, flags in cases.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    run_ranks(world, TESTS / "support" / "train_worker.py", str(tmp_path / "cases.json"), str(tmp_path))
    failed = {}
    for name, flags in cases.items():
        try:
            _check(tmp_path / name, flags, world)
        except AssertionError as error:
            failed[name] = str(error).splitlines()[:3]
    assert failed == {}

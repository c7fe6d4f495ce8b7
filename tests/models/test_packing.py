"""Law: a packed sample is its documents, each run alone; float64, to 1e-10."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_nexus.models.decoder import DecoderStage, Loss, stage_layers
from megatron_nexus.models.packing import Stream
from megatron_nexus.models.parameters import logical_parameters
from tests.models.test_decoder import ALL, ALONE, MODEL
from tests.support import reference
from tests.support.batches import document_positions
from tests.support.cases import first_by_default

BATCH, LENGTH = 3, 24
APART = dataclasses.replace(ALONE, reset_position_ids=True, reset_attention_mask=True)


def sample() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, MODEL.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    positions = document_positions(BATCH, LENGTH)
    assert len({int(count) for count in (positions == 0).sum(dim=1)}) > 1, "samples of several documents each"
    return ids[:, :-1], ids[:, 1:], positions


@pytest.mark.parametrize(
    "changes",
    first_by_default(
        2,
        [
            {"attention_order": 2},
            {"sliding_window": 4},
            {},
            {"attention_order": 2, "attention_inner": "cross"},
        ],
    ),
    ids=str,
)
@pytest.mark.parametrize("recompute", ["none", pytest.param("full", marks=pytest.mark.law)])
@pytest.mark.parametrize("stages", [1, *(pytest.param(n, marks=pytest.mark.law) for n in (2, 3))])
def test_a_packed_sample_is_its_documents_run_alone(
    stages: int, recompute: str, changes: dict[str, object]
) -> None:
    tokens, labels, positions = sample()
    model = dataclasses.replace(MODEL, **changes)
    context = dataclasses.replace(APART, recompute=recompute)
    row = [DecoderStage(model, layers, context) for layers in stage_layers(model, LENGTH, stages)]
    stream: Stream = (tokens, positions)
    for stage in row:
        stream = stage(stream)
    assert isinstance(stream, Tensor)
    loss = Loss(model, ALONE.tp, ALONE.shard)(stream, labels)
    loss.backward()

    parameters = {n: p for stage in row for n, (_, p) in logical_parameters(stage).items()}
    weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    expected = reference.loss(weights, tokens, labels, dataclasses.asdict(model), positions)
    expected.backward()
    assert abs(loss - expected).item() < 1e-10
    for name, parameter in parameters.items():
        assert torch.allclose(parameter.grad, weights[name].grad, rtol=0.0, atol=1e-10), name


def output(context: object, tokens: Tensor, positions: Tensor) -> Tensor:
    return DecoderStage(MODEL, ALL, context)((tokens, positions))


def test_without_a_reset_positions_change_nothing() -> None:
    tokens, _, positions = sample()
    assert torch.equal(output(ALONE, tokens, positions), DecoderStage(MODEL, ALL, ALONE)(tokens))


def test_within_a_document_rotary_positions_are_relative() -> None:
    tokens, _, positions = sample()
    masked = dataclasses.replace(ALONE, reset_attention_mask=True)
    assert torch.allclose(output(masked, tokens, positions), output(APART, tokens, positions), atol=1e-10)


def test_restarted_positions_alone_leave_documents_in_sight() -> None:
    tokens, _, positions = sample()
    restarted = dataclasses.replace(ALONE, reset_position_ids=True)
    second = int((positions[0] == 0).nonzero()[1])
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % MODEL.vocab_size
    seen = [
        (output(context, tokens, positions) - output(context, changed, positions))[second:, 0].abs().max()
        for context in (restarted, APART)
    ]
    assert seen[0] > 1e-6
    assert seen[1] == 0.0
    plain = output(ALONE, tokens, positions)
    both = output(restarted, tokens, positions)
    assert torch.equal(both[:second, 0], plain[:second, 0])
    assert not torch.allclose(both[second:, 0], plain[second:, 0], atol=1e-6)

"""Law: FlexAttention's block mask is the dense mask, and attention under it is attention under that mask.

The kernels of GPUs are compared by benchmarks/gpu_kit.py.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from megatron_nexus.kernels.document_attention import block_masked_attention, document_block_mask
from megatron_nexus.models.decoder import DecoderStage, Loss, compile_blocks
from megatron_nexus.models.packing import packing_of, window_mask
from tests.models.test_decoder import ALL, ALONE, MODEL
from tests.support.batches import document_positions

pytestmark = [pytest.mark.law, pytest.mark.torch_versions]
MASKED = replace(ALONE, reset_attention_mask=True)
FLEX = replace(MASKED, flex_attention=True)


@pytest.mark.parametrize(("groups", "window"), [(2, 5), (4, 0), (4, 5), (2, 0)])
def test_the_block_mask_is_the_dense_mask(groups: int, window: int) -> None:
    samples, tokens = 2, 300  # three blocks, the last one short
    positions = document_positions(samples, tokens)
    blocks = document_block_mask((positions == 0).cumsum(dim=1), window)
    expected = window_mask(packing_of(positions, MASKED), tokens, tokens, window, positions.device)
    assert expected is not None
    assert torch.equal(create_mask(blocks.mask_mod, samples, 1, tokens, tokens, "cpu"), expected)
    q, k, v = (torch.randn(samples, n, tokens, 8, dtype=torch.float64) for n in (4, groups, groups))
    mixed = block_masked_attention(q, k, v, blocks, 0.3)
    reference = F.scaled_dot_product_attention(q, k, v, expected, scale=0.3, enable_gqa=groups < 4)
    assert torch.allclose(mixed, reference, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_under_block_masks_equal_eager_ones_under_dense_masks(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients; new documents do not compile again."""
    # On a CPU torch refuses the backward, for which it has no kernel; its equations are there.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    stages = [DecoderStage(MODEL, ALL, MASKED), DecoderStage(MODEL, ALL, replace(FLEX, recompute=recompute))]
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compile_blocks(stages[1], counter)
    loss = Loss(MODEL, ALONE.tp, ALONE.shard)
    for seed in range(2):
        tokens = torch.randint(0, MODEL.vocab_size, (3, 24), generator=torch.Generator().manual_seed(seed))
        positions = document_positions(3, 24).roll(seed, 0)
        found = []
        for stage in stages:
            stage.zero_grad()
            value = loss(stage((tokens, positions)), tokens.roll(-1, 1))
            value.backward()
            found.append([value.detach(), *(p.grad for p in stage.parameters())])
        for mine, expected in zip(*found, strict=True):
            assert torch.allclose(mine, expected, rtol=0.0, atol=1e-12)
    assert counter.frame_count == 1

"""Activations are seen between steps, and compiled blocks neither break nor are compiled again for it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megatron_nexus.config.command_line import build
from megatron_nexus.models.decoder import DecoderStage, compile_blocks
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import logical_parameters
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard
from tests.support.checkpoints import SIZES

pytestmark = pytest.mark.slow  # compiles


@pytest.mark.parametrize("grouped", [False, True])
def test_compiled_blocks_show_their_activations_without_being_compiled_again(grouped: bool) -> None:
    torch._dynamo.reset()
    model = build(SIZES).model
    context = LayerContext(TensorParallel(None), Shard(0, 1), seed=3, group_projections=grouped)
    stage, counter = DecoderStage(model, range(4), context), CompileCounter()
    compile_blocks(stage, counter)
    tokens = torch.randint(0, model.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    before = stage(tokens)
    compiled = counter.frame_count
    names = {id(parameter): name for name, (_, parameter) in logical_parameters(stage).items()}
    seen: list[str] = []
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        context.observer.callback = lambda reader, *_: seen.append(names[id(reader)])
        stage(tokens)
        context.observer.callback = None
    after = stage(tokens)
    readers = [f"attention.{p}.{w}" for p in "qkv" for w in ("w_a", "w_d")] + ["feed_forward.down"]
    assert sorted(seen) == sorted(f"layers.{i}.{reader}" for i in range(2) for reader in readers)
    assert compiled == counter.frame_count > 0
    assert torch.equal(before, after)

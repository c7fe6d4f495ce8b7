"""The kernels that the stage `variants` of gpu_kit.py times, each with the code that it replaces."""

from collections.abc import Iterator
from functools import partial

import torch
from gpu_stage import COMPILER, CUDA, DEVICE, Row, peak_gib, positions_of, reset_memory, seconds_of
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.config.command_line import build
from megatron_nexus.kernels.cross_entropy import CHUNKED, compiled_kernel
from megatron_nexus.kernels.document_attention import block_masked_attention, document_block_mask
from megatron_nexus.models.attention import attention_specs
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.nexus_rank import NexusRank, attention_widths
from megatron_nexus.parallel.cross_entropy import vocabulary_parallel_cross_entropy
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard


def loss_variants() -> Iterator[Row]:
    """The cross entropy, forward and backward; predictions: bytes over 2.75 TB/s, 8 of them of the copy."""
    tokens, vocabulary = (16384, 32000) if CUDA else (64, 512)
    head = torch.randn(tokens, vocabulary, device=DEVICE).bfloat16()
    labels = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    ours = partial(vocabulary_parallel_cross_entropy, tp=TensorParallel(None))

    def timed(loss: object) -> None:
        assert callable(loss)
        loss(head.detach().requires_grad_() * 1).backward()

    forms = {
        "torch's in float32": (lambda z: F.cross_entropy(z.float(), labels), 7.6),
        "in chunks": (lambda z: ours(z, labels, (0, vocabulary), kernel=CHUNKED), 6.5),
        "compiled": (lambda z: ours(z, labels, (0, vocabulary), kernel=compiled_kernel(COMPILER)), 3.0),
    }
    for name, (loss, predicted_ms) in forms.items():
        reset_memory()
        ms = 1e3 * seconds_of(partial(timed, loss), 5)
        yield Row(f"cross entropy, {name}", ms, "ms", predicted_ms if CUDA else None)
        if CUDA:
            yield Row(f"cross entropy, {name}: peak", peak_gib(), "GiB")


def nexus_variants() -> Iterator[Row]:
    """Q, K and V of a block by separate products and by grouped ones, forward and backward."""
    model = build({"preset": "nexusformer-240m" if CUDA else "nexusformer-tiny"}).model
    specs = {name: attention_specs(model, "a")[name] for name in ("q", "k", "v")}
    dtype = torch.bfloat16
    x = torch.randn(
        4096 if CUDA else 32, 4, model.hidden_size, device=DEVICE, dtype=dtype, requires_grad=True
    )
    ms = {}
    for name, grouped in (("separate", False), ("grouped", True)):
        shard = Shard(0, 1, 64 if CUDA else 1)
        context = LayerContext(TensorParallel(None), shard, 1, dtype, group_projections=grouped)
        maps = NexusRank(specs, attention_widths(model), context).to(DEVICE)

        def step(maps: NexusRank = maps) -> None:
            outputs = maps(x)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

        ms[name] = 1e3 * seconds_of(step, 10 if CUDA else 2)
        yield Row(f"q, k, v of a block, {name} products", ms[name], "ms")
    yield Row("q, k, v: grouped / separate", ms["grouped"] / ms["separate"], "x", 0.86 if CUDA else None)


def document_variants() -> Iterator[Row]:
    """Four documents a sample by a dense mask and by FlexAttention: 0.27 of the blocks of causal."""
    samples, length = 4, 4096
    document = (positions_of(samples, length, 4) == 0).cumsum(dim=1).to(DEVICE)
    same = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    blocks = document_block_mask(document)
    q, k, v = (
        torch.randn(samples, 12, length, 64, device=DEVICE).bfloat16().requires_grad_() for _ in range(3)
    )
    flex = torch.compile(block_masked_attention, dynamic=False)

    def step(mixed: object) -> None:
        assert callable(mixed)
        result: Tensor = mixed()
        result.sum().backward()

    forms = {
        "a dense mask": lambda: F.scaled_dot_product_attention(q, k, v, same, scale=0.125),
        "FlexAttention": lambda: flex(q, k, v, blocks, 0.125),
        "no mask, causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125),
    }
    ms = {name: 1e3 * seconds_of(partial(step, form), 5) for name, form in forms.items()}
    for name, value in ms.items():
        yield Row(f"attention of 240m, {name}", value, "ms")
    for name in ("a dense mask", "no mask, causal"):
        predicted = 0.4 if "causal" in name else None
        yield Row(f"documents: FlexAttention / {name}", ms["FlexAttention"] / ms[name], "x", predicted)

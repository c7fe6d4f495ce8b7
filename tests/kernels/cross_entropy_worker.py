"""One rank of the test of the cross entropies: loss and gradient of its part of the vocabulary.

Writes, for each form and type, the largest error of both from torch's cross entropy in float64, and the bytes
a token that are kept for backward besides logits and labels.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megatron_nexus.config.run_config import ModelConfig
from megatron_nexus.kernels.cross_entropy import CHUNKED, CrossEntropyKernel, compiled_kernel
from megatron_nexus.models.decoder import Head, Loss
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.parallel.cross_entropy import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_divergence,
)
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.parallel.world import read_world
from megatron_nexus.spec.shard import Shard
from megatron_nexus.training.linear_cross_entropy import LinearCrossEntropy
from tests.support.waiting import TIMEOUT_S

SMALL = 13
TOKENS, VOCABULARY = 7, 100_001  # 2 or 5 tokens a chunk, and a last column that is padding on 2 ranks


class Kept:
    """The storages that autograd keeps within the block, by address."""

    def __init__(self, *known: torch.Tensor) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        self._sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes_per_token(self) -> float:
        return sum(size for at, size in self._sizes.items() if at not in self._known) / TOKENS


def errors(
    kernel: CrossEntropyKernel | None, dtype: torch.dtype, tp: TensorParallel
) -> tuple[float, float, float]:
    """Error of the loss in nats, of the gradient in norm, relative to that gradient's norm; bytes a token."""
    generator = torch.Generator().manual_seed(3)
    logits = (3.0 * torch.randn(TOKENS, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[0], labels[1] = 0, VOCABULARY - 1
    whole = logits.to(torch.float64, copy=True).requires_grad_()
    expected = F.cross_entropy(whole, labels)
    (2.0 * expected).backward()
    assert whole.grad is not None
    size = -(-VOCABULARY // tp.size)
    start, stop = tp.rank * size, min(VOCABULARY, (tp.rank + 1) * size)
    mine = torch.zeros(TOKENS, size, dtype=dtype)  # padding as the head makes it
    mine[:, : stop - start] = logits[:, start:stop]
    mine.requires_grad_()
    logits_here = mine * 1
    kept = Kept(logits_here, labels)
    with kept.hooks:
        loss = vocabulary_parallel_cross_entropy(logits_here, labels, (start, stop), tp, kernel)
    (2.0 * loss).backward()
    assert mine.grad is not None and mine.grad.dtype == dtype
    assert not mine.grad[:, stop - start :].any(), "padding has a gradient"
    difference = mine.grad[:, : stop - start].double() - whole.grad[:, start:stop]
    return (
        abs(float((loss - expected).detach())),
        float(difference.norm() / whole.grad.norm()),
        kept.bytes_per_token,
    )


def linear_errors(
    dtype: torch.dtype, tp: TensorParallel, group: ProcessGroup, multiple: int = 1
) -> tuple[float, float, float]:
    """Both errors of head and loss in one, by blocks of 3 tokens; gradients of input and head.

    With a `multiple` above the vocabulary the second rank holds padding alone.
    """
    tokens, samples, hidden = 4, 2, 6
    generator = torch.Generator().manual_seed(5)
    x_TBD = torch.randn(tokens, samples, hidden, generator=generator).to(dtype)
    weight_VD = torch.randn(SMALL, hidden, generator=generator).to(dtype)
    labels_BT = torch.randint(0, SMALL, (samples, tokens), generator=generator)
    wide = [tensor.double().requires_grad_() for tensor in (x_TBD, weight_VD)]
    expected = F.cross_entropy((wide[0] @ wide[1].t()).flatten(0, 1), labels_BT.t().flatten())
    (2.0 * expected).backward()

    model = ModelConfig(vocab_size=SMALL, hidden_size=hidden, num_layers=1)
    shard = Shard(tp.rank, tp.size, multiple)
    head = Head(model, LayerContext(tp, shard, None, dtype, ends_before_head=True))
    (start, stop), weight = Loss(model, tp, shard).vocabulary_range, head.projection.get_parameter("weight")
    weight.data[: stop - start] = weight_VD[start:stop]
    loss = LinearCrossEntropy((start, stop), tp, group if tp.size > 1 else None, lambda *_: 3)
    loss.bind(head)
    mine = (x_TBD.chunk(tp.size)[tp.rank] if tp.sequence_parallel else x_TBD).clone().requires_grad_()
    found = loss(mine * 1, labels_BT)
    (2.0 * found).backward()
    assert mine.grad is not None and weight.grad is not None
    assert not weight.grad[stop - start :].any(), "padding has a gradient"
    logits = loss.of_logits(lambda logits_TBV, _: logits_TBV)(mine.detach(), labels_BT)
    assert logits.shape == (tokens, samples, len(weight))
    whole = wide[0].grad.chunk(tp.size)[tp.rank] if tp.sequence_parallel else wide[0].grad
    pairs = [(mine.grad, whole), (weight.grad[: stop - start], wide[1].grad[start:stop])]
    gradient = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs if b.numel())
    return abs(float((found - expected).detach())), gradient, 0.0


def divergence_errors(tp: TensorParallel) -> tuple[float, float, float]:
    """Both errors of the KL divergence of logits from a reference's, token by token, in float64."""
    generator = torch.Generator().manual_seed(4)
    logits, reference = 2.0 * torch.randn(2, TOKENS, SMALL, generator=generator, dtype=torch.float64)
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    whole = logits.clone().requires_grad_()
    expected = F.kl_div(
        whole.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    (expected * weights).sum().backward()
    assert whole.grad is not None
    size = -(-SMALL // tp.size)
    start, stop = tp.rank * size, min(SMALL, (tp.rank + 1) * size)
    padded = torch.zeros(2, TOKENS, size, dtype=torch.float64)
    padded[0, :, : stop - start] = logits[:, start:stop]
    padded[1, :, : stop - start] = reference[:, start:stop]
    mine = padded[0].clone().requires_grad_()
    found = vocabulary_parallel_divergence(mine, padded[1], (start, stop), tp)
    (found * weights).sum().backward()
    assert mine.grad is not None and not mine.grad[:, stop - start :].any(), "padding has a gradient"
    difference = mine.grad[:, : stop - start] - whole.grad[:, start:stop]
    return float((found - expected).abs().max()), float(difference.norm() / whole.grad.norm()), 0.0


def main() -> None:
    world = read_world(os.environ)
    mesh = make_mesh(world, tp_size=world.size, pp_size=1, timeout_s=TIMEOUT_S)
    # As the engine does: or every rank would leave 67 MB in /dev/shm.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    tp = TensorParallel(mesh.tp_group)
    kernels = {"default": None, "chunked": CHUNKED, "compiled": compiled_kernel("aot_eager")}
    found = {
        f"{name} {dtype}": errors(kernel, dtype, tp)
        for name, kernel in kernels.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }
    for dtype in (torch.float32, torch.bfloat16):
        found[f"linear {dtype}"] = linear_errors(dtype, tp, mesh.tp_group)
        split = TensorParallel(mesh.tp_group, sequence_parallel=True)
        found[f"linear,split {dtype}"] = linear_errors(dtype, split, mesh.tp_group)
        found[f"linear,padding {dtype}"] = linear_errors(dtype, tp, mesh.tp_group, multiple=SMALL + 3)
    found["divergence torch.float64"] = divergence_errors(tp)
    (Path(sys.argv[1]) / f"errors_{world.size}_{world.rank}.json").write_text(json.dumps(found))
    close_mesh()


if __name__ == "__main__":
    main()

"""One rank of the test of the cross entropies: loss and gradient of its part of the vocabulary.

Writes, for each form and type, the largest error of both from torch's cross entropy in float64.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from megatron_nexus.kernels.cross_entropy import CHUNKED, CrossEntropyKernel, compiled_kernel
from megatron_nexus.parallel.cross_entropy import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_divergence,
)
from megatron_nexus.parallel.mesh import close_mesh, make_mesh
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.parallel.world import read_world
from tests.support.waiting import TIMEOUT_S

SMALL = 13
TOKENS, VOCABULARY = 7, 100_001  # 2 or 5 tokens a chunk, and a last column that is padding on 2 ranks


def errors(kernel: CrossEntropyKernel | None, dtype: torch.dtype, tp: TensorParallel) -> tuple[float, float]:
    """Error of the loss in nats, and of the gradient in norm, relative to that gradient's norm."""
    generator = torch.Generator().manual_seed(3)
    logits = (3.0 * torch.randn(TOKENS, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[0], labels[1] = 0, VOCABULARY - 1
    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole, labels)
    (2.0 * expected).backward()
    assert whole.grad is not None
    size = -(-VOCABULARY // tp.size)
    start, stop = tp.rank * size, min(VOCABULARY, (tp.rank + 1) * size)
    mine = torch.zeros(TOKENS, size, dtype=dtype)  # padding as the head makes it
    mine[:, : stop - start] = logits[:, start:stop]
    mine.requires_grad_()
    loss = vocabulary_parallel_cross_entropy(mine * 1, labels, (start, stop), tp, kernel)
    (2.0 * loss).backward()
    assert mine.grad is not None and mine.grad.dtype == dtype
    assert not mine.grad[:, stop - start :].any(), "padding has a gradient"
    difference = mine.grad[:, : stop - start].double() - whole.grad[:, start:stop]
    return abs(float(loss - expected)), float(difference.norm() / whole.grad.norm())


def divergence_errors(tp: TensorParallel) -> tuple[float, float]:
    """The same of the KL divergence of logits from a reference's, token by token, in float64."""
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
    return float((found - expected).abs().max()), float(difference.norm() / whole.grad.norm())


def main() -> None:
    world = read_world(os.environ)
    mesh = make_mesh(world, tp_size=world.size, pp_size=1, timeout_s=TIMEOUT_S)
    tp = TensorParallel(mesh.tp_group)
    kernels = {"default": None, "chunked": CHUNKED, "compiled": compiled_kernel("aot_eager")}
    found = {
        f"{name} {dtype}": errors(kernel, dtype, tp)
        for name, kernel in kernels.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    found["divergence torch.float64"] = divergence_errors(tp)
    (Path(sys.argv[1]) / f"errors_{world.size}_{world.rank}.json").write_text(json.dumps(found))
    close_mesh()


if __name__ == "__main__":
    main()

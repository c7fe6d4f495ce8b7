"""What a training step of two architectures takes at least: products, attention and activations alone.

    taskset -c 1 python benchmarks/step_bound.py --precision fp32 bf16 --rounds 9

The Nexusformer of train_step.py and litgpt's decoder of the same FLOPs, in CPU seconds of one thread.
Products are those of forward and backward by shape, attention is torch's kernel. Activations are compiled
kernels, and what they read and write at the rate at which memory is copied. Both are measured in turn.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from contestants import MICRO_BATCH, PEER_FEED_FORWARD, PRESET
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.config.command_line import build
from megatron_nexus.models.feed_forward import swiglu

CONFIG = build({"preset": PRESET})
MODEL, LENGTH = CONFIG.model, CONFIG.training.seq_length
TOKENS = MICRO_BATCH * LENGTH
D, M, A, HEADS = MODEL.hidden_size, MODEL.nexus_m, MODEL.nexus_a, MODEL.num_attention_heads

Shapes = Counter[tuple[int, int]]
"""How many products of a block have these inputs and outputs."""
NEXUS: Shapes = Counter({(D, M): 3, (M, A): 3, (A, D): 3, (D, D): 1, (D, MODEL.ffn_hidden_size): 2})
NEXUS[(MODEL.ffn_hidden_size, D)] = 1
LITGPT: Shapes = Counter({(D, 3 * D): 1, (D, D): 1, (D, PEER_FEED_FORWARD): 2, (PEER_FEED_FORWARD, D): 1})
# Outputs of GELU and of SwiGLU per token and block.
WIDTHS = {"nexusformer": (3 * (M + A), MODEL.ffn_hidden_size), "litgpt": (0, PEER_FEED_FORWARD)}
MOVED_BY_GELU, MOVED_BY_SWIGLU = 5, 8
"""Numbers read and written for each output, forward and backward, where each array moves once."""


def cpu_seconds(action: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    began = time.process_time()
    action()
    return time.process_time() - began


def products(shapes: Shapes, dtype: torch.dtype) -> Callable[[], None]:
    """All products of a step: of the blocks, and of the head."""
    layers = {
        **{shape: MODEL.num_layers * count for shape, count in shapes.items()},
        (D, MODEL.vocab_size): 1,
    }
    made: list[tuple[int, list[Tensor]]] = []
    for (k, n), count in layers.items():
        made.append((count, [torch.randn(size).to(dtype) for size in ((TOKENS, k), (n, k), (TOKENS, n))]))

    def run() -> None:
        for count, (x, w, grad) in made:
            for _ in range(count):
                torch.mm(x, w.t())
                torch.mm(grad, w)
                torch.mm(grad.t(), x)

    return run


def attention(dtype: torch.dtype) -> Callable[[], None]:
    """Attention of all blocks, forward and backward."""
    shape = (MICRO_BATCH, HEADS, LENGTH, MODEL.kv_channels)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))

    def run() -> None:
        for _ in range(MODEL.num_layers):
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(mixed, (q, k, v), mixed)

    return run


def activations(widths: tuple[int, int], dtype: torch.dtype) -> Callable[[], None]:
    """All activations of a step, forward and backward, each compiled by itself."""
    gelu, swish = torch.compile(F.gelu, dynamic=False), torch.compile(swiglu, dynamic=False)
    work: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
    for function, width, inputs in ((gelu, widths[0], 1), (swish, widths[1], 2)):
        if width:
            shape = (TOKENS, width)
            work.append((function, [torch.randn(shape).to(dtype).requires_grad_() for _ in range(inputs)]))

    def run() -> None:
        for _ in range(MODEL.num_layers):
            for function, inputs in work:
                y = function(*inputs)
                torch.autograd.grad(y, inputs, y.detach())

    return run


def moves(widths: tuple[int, int], dtype: torch.dtype) -> Callable[[], None]:
    """Copies of as many numbers as the activations read and write."""
    moved = MOVED_BY_GELU * widths[0] + MOVED_BY_SWIGLU * widths[1]
    x = torch.randn(TOKENS, moved // 2).to(dtype)
    into = torch.empty_like(x)

    def run() -> None:
        for _ in range(MODEL.num_layers):
            into.copy_(x)

    return run


def parts(dtype: torch.dtype) -> dict[str, dict[str, Callable[[], None]]]:
    """What is measured, of either architecture."""
    shapes = {"nexusformer": NEXUS, "litgpt": LITGPT}
    return {
        "products": {name: products(of_block, dtype) for name, of_block in shapes.items()},
        "activations, compiled": {name: activations(w, dtype) for name, w in WIDTHS.items()},
        "what they move, copied": {name: moves(w, dtype) for name, w in WIDTHS.items()},
        "attention, the same in both": dict.fromkeys(WIDTHS, attention(dtype)),
    }


def main() -> None:
    """Print a table for each precision."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9, help="times each part is measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for precision in given.precision:
        print(
            f"\n| {precision}, CPU ms, median (least) | {' | '.join(WIDTHS)} | ratio |\n|---|---:|---:|---:|"
        )
        for what, actions in parts(torch.bfloat16 if precision == "bf16" else torch.float32).items():
            seconds: dict[str, list[float]] = {name: [] for name in actions}
            for turn in range(given.rounds + 1):
                for name in sorted(actions, reverse=turn % 2 == 0):
                    seconds[name].append(cpu_seconds(actions[name]))
            rounds = [values[1:] for values in seconds.values()]  # the first compiles
            ratio = statistics.median(a / b for a, b in zip(*rounds, strict=True))
            cells = [f"{1e3 * statistics.median(values):.0f} ({1e3 * min(values):.0f})" for values in rounds]
            print(f"| {what} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""What parameters cost: their number and their floating-point operations per token.

One multiply-add is two FLOPs. Counted are matrix products only, as in the model-FLOPs convention of the
PaLM paper (appendix B): weights 2 FLOPs per element and token forward and twice that backward, attention
scores and values over the whole sequence as if no mask saved half of them; nothing computed again.
"""

from collections.abc import Iterable

from megatron_nexus.spec.param import ParamSpec, Role


def parameter_count(specs: Iterable[ParamSpec]) -> int:
    """Elements of all logical tensors."""
    return sum(spec.numel for spec in specs)


def weight_flops_per_token(specs: Iterable[ParamSpec]) -> int:
    """Return FLOPs per token of the products with weights, forward."""
    return sum(2 * spec.numel for spec in specs if spec.role is Role.MATMUL)


def attention_flops_per_token(attention_width: int, seq_length: int, inner_width: int = 0) -> int:
    """Return FLOPs per token of one layer's scores and weighted values, forward: 2 x (2 x width x length).

    `inner_width`: that of all inner attentions of a higher order, which cost the same by their width.
    """
    return 4 * (attention_width + inner_width) * seq_length


def balanced_cuts(costs: list[int], parts: int) -> list[int]:
    """Cut a row of layers into `parts` runs so that the most expensive run is as cheap as possible.

    Return `parts + 1` indices from 0 to len(costs); every run has at least one layer. Dynamic programming in
    O(parts x layers): the first i layers in k runs are the first j in k - 1 runs, then one run from j to i.
    Moving j up makes the first part cost more and the last run less, so the best j is where the two cross,
    and as i grows that crossing only moves up.
    """
    count = len(costs)
    assert 1 <= parts <= count, f"{count} layers make no {parts} stages"
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[k][i]: cost of the most expensive of k runs over the first i layers; cut[k][i]: the last cut.
    best = [[float("inf")] * (count + 1) for _ in range(parts + 1)]
    cut = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0
    for k in range(1, parts + 1):
        crossing = k - 1
        for i in range(k, count + 1):
            while crossing < i and best[k - 1][crossing] < total[i] - total[crossing]:
                crossing += 1
            for j in range(max(k - 1, crossing - 1), min(crossing + 1, i)):
                largest = max(best[k - 1][j], total[i] - total[j])
                if largest < best[k][i]:
                    best[k][i], cut[k][i] = largest, j
    cuts = [count]
    for k in range(parts, 0, -1):
        cuts.append(cut[k][cuts[-1]])
    return cuts[::-1]

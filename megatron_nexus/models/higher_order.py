"""Higher-order attention: queries and keys that are themselves read from earlier tokens by attention.

The paper states (Nexus: Higher-Order Attention Mechanisms in Transformers, Chen et al., 2025, arXiv
2512.03377; known here by its abstract and the recursion that reviews of it quote, not by its full text):

    attention of order m = attention(inner attention_q(X), inner attention_k(X), V)

The inner two are nested self-attentions, of order m - 1, on the side of the queries and on that of the keys;
all share their weights, so that a higher order costs O(1) parameters.

Our reading:

    A_1 = softmax(Q K^T / sqrt(H))        Q_m = A_(m-1) Q        A_m = softmax(Q_m K_m^T / sqrt(H))
    output = A_m V                        K_m = A_(m-1) K

- Weights: inner queries and keys come from W_Q and W_K, the values of an inner attention from the weights of
  its side. No parameter is added. Order 1 is standard attention; each further order costs two attentions.
- Mask: the outer attention's. A refined query or key knows its own and earlier tokens of its document.
- Positions: values are not turned, as everywhere. Each attention turns its queries and keys, refined ones by
  the position of the token whose they are. QK norm belongs to the projections: once, before all of this.
- Grouped-query attention is multi-head attention with repeated keys: the heads of a group share K and each
  reads it by its own A. So refined keys, and the cache of them, are each head's own; V stays shared.

Rank: Q_m has the width H of a head, so the T x T scores of one text have rank H at most, whatever the order.
What escapes that bound is the score of a pair of tokens x, y at given places of a given text, as a matrix
over all x and y: at order 1 it is q(x) k(y)^T, of rank H at most; from order 2 on, x reads its query from y
too.

T tokens, B batch, N heads of this rank, G heads of keys, H head size, S tokens with those in the cache.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_nexus.models.kv_cache import LayerCache
from megatron_nexus.models.rotary import rotate


def refined(
    q_TBNH: Tensor,
    k_TBGH: Tensor,
    order: int,
    tables: tuple[Tensor, Tensor],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    cache: LayerCache | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of `order`, both [T, B, N, H], not turned yet.

    `attend` is the outer attention's function of queries, keys and values [B, N, T or S, H]; `tables` are the
    rotary ones of the tokens; the cache keeps what later tokens read of these.
    """

    def kept(name: str, new_BNTH: Tensor) -> Tensor:
        return cache.extend(name, new_BNTH) if cache is not None else new_BNTH

    share = q_TBNH.shape[2] // k_TBGH.shape[2]
    q_values = kept("q values", q_TBNH.permute(1, 2, 0, 3))
    k_values = each_head(kept("k values", k_TBGH.permute(1, 2, 0, 3)), share)
    q, k = q_TBNH, k_TBGH
    for level in range(1, order):
        turned_q, turned_k = rotate(q, *tables), kept(f"k of order {level}", rotate(k, *tables))
        turned_k = each_head(turned_k, turned_q.shape[1] // turned_k.shape[1])
        # Two attentions, though their weights are equal: fused kernels never hold these T x T numbers.
        q, k = (attend(turned_q, turned_k, y).permute(2, 0, 1, 3) for y in (q_values, k_values))
    return q, k


def each_head(x_BGTH: Tensor, share: int) -> Tensor:
    """[B, G, T, H] -> [B, N, T, H]: what `share` neighbouring heads have in common, for each of them."""
    return x_BGTH.repeat_interleave(share, dim=1) if share > 1 else x_BGTH

"""Higher-order attention: queries and keys that are themselves outputs of inner attentions.

What is stated (Nexus: Higher-Order Attention Mechanisms in Transformers, Chen et al., 2025, arXiv 2512.03377;
known here by its abstract and by what reviews quote, not by its full text):

    attention of order m = attention(inner attention_q(X), inner attention_k(X), V)

The inner two are self-attentions of order m - 1, one refines the queries and one the keys; values are not
refined; all share the projections, so that a higher order costs O(1) parameters. One source writes it as a
formula, for order 2: Q' = softmax(Q Q^T) Q, K' = softmax(K K^T) K.

`--attention-inner` offers that form and another reading of the same sentence; at order 1 they are the same:

    self     Q_m = softmax(Q_(m-1) Q_(m-1)^T / sqrt(H)) Q      K_m = softmax(K_(m-1) K_(m-1)^T / sqrt(H)) K
    cross    Q_m = A_(m-1) Q      K_m = A_(m-1) K      A_m = softmax(Q_m K_m^T / sqrt(H))
    output = softmax(Q_m K_m^T / sqrt(H)) V            Q_1 = Q, K_1 = K

What no source says, and is our reading:

- Orders above 2: the values of every inner attention are those of order 1.
- Scale and mask: the outer attention's. A refined query or key knows its own and earlier tokens of its
  document.
- Positions: values are not turned, as everywhere. Each attention turns its queries and keys, refined ones by
  the position of their token. QK norm belongs to the projections: once, before all of this.
- Grouped-query attention: in `self` the heads of a group share K, and so its refinement. In `cross` each head
  refines K by its own scores, so refined keys, and the cache of them, are each head's own. V stays shared.
- Channels that heads have grown are refined, but the inner scores of `self` do not count them: the key's new
  channels are active at once, and would change the scores of keys with keys.
- `--attention-gate`: Q_m = Q + a (A Q - Q), K alike, with a learnt `a` of each head and side, 0 at first: the
  model begins as one of order 1, and the gradient of `a` is not zero. So a trained model gains an order.

Rank: Q_m has the width H of a head, so the T x T scores of one text have rank H at most, whatever the order.
What escapes that bound is the score of a pair of tokens x, y at given places of a given text, as a matrix
over all x and y: at order 1 it is q(x) k(y)^T, of rank H at most; from order 2 on, x reads its query from y
too.

T tokens, B batch, N heads of this rank, G heads of keys, H head size, R <= H head size before growth,
S tokens with those in the cache.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.models.kv_cache import LayerCache
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.models.rotary import Tables, rotate
from megatron_nexus.spec.param import Axis, Constant, Flow, Layout, ParamSpec, Role

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The outer attention's function of queries [B, N, T, H], keys and values [B, N, S, H]."""


def gate_specs(model: ModelConfig, prefix: str) -> dict[str, tuple[ParamSpec, ...]]:
    """Return the gates of one layer's attention by part, q_gate and k_gate; none without --attention-gate."""
    if not model.attention_gate:
        return {}
    queries = Axis("heads", model.num_attention_heads, Layout.SHARDED)
    keys = queries if model.attention_inner == "cross" else replace(queries, size=model.query_groups)
    return {
        part: (ParamSpec(f"{prefix}.{part}.weight", (axis,), Constant(0.0), Role.VECTOR, (Flow.GATES,)),)
        for part, axis in (("q_gate", queries), ("k_gate", keys))
    }


class HeadGate(SpecModule):
    """x + a (y - x) with a learnt `a` of each head."""

    def __init__(self, gate: ParamSpec, context: LayerContext) -> None:
        super().__init__({"weight": gate}, context)

    def forward(self, x_TBNH: Tensor, y_TBNH: Tensor) -> Tensor:
        """Both [T, B, N, H] -> [T, B, N, H]."""
        return x_TBNH + self.get_parameter("weight")[:, None] * (y_TBNH - x_TBNH)


class Refinement(nn.Module):
    """Q and K -> those of the model's order, by inner attentions."""

    def __init__(
        self, model: ModelConfig, specs: dict[str, tuple[ParamSpec, ...]], context: LayerContext
    ) -> None:
        super().__init__()
        self.levels = range(1, model.attention_order)
        self.inner = model.attention_inner
        self.counted = model.rotary_channels
        self.gates = nn.ModuleDict({part: HeadGate(gate, context) for part, (gate,) in specs.items()})

    def forward(
        self,
        q_TBNH: Tensor,
        k_TBGH: Tensor,
        tables: Tables | None,
        attend: Attend,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Refined queries [T, B, N, H] and keys [T, B, G or N, H], not turned yet.

        `tables` are the rotary ones of the tokens; the cache keeps what later tokens read of these.
        """
        if self.inner == "self":
            return (
                self._alone("q", q_TBNH, tables, attend, cache),
                self._alone("k", k_TBGH, tables, attend, cache),
            )
        return self._together(q_TBNH, k_TBGH, tables, attend, cache)

    def _alone(
        self,
        side: str,
        x_TBNH: Tensor,
        tables: Tables | None,
        attend: Attend,
        cache: LayerCache | None,
    ) -> Tensor:
        """One side, each of whose tokens reads the earlier ones of the same side."""
        values, refined = _kept(cache, f"{side} values", x_TBNH.permute(1, 2, 0, 3)), x_TBNH
        for level in self.levels:
            turned = rotate(refined, tables)
            keys = _kept(cache, f"{side} of order {level}", turned)
            grown = turned.shape[-1] - self.counted
            queries = F.pad(turned[..., : self.counted], (0, grown)) if grown else turned
            refined = self._gated(side, x_TBNH, attend(queries, keys, values))
        return refined

    def _together(
        self,
        q_TBNH: Tensor,
        k_TBGH: Tensor,
        tables: Tables | None,
        attend: Attend,
        cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Both sides, by the same scores of queries with keys."""
        heads = q_TBNH.shape[2]
        q_values = _kept(cache, "q values", q_TBNH.permute(1, 2, 0, 3))
        k_values = each_head(_kept(cache, "k values", k_TBGH.permute(1, 2, 0, 3)), heads)
        k_TBNH = k_TBGH.repeat_interleave(heads // k_TBGH.shape[2], dim=2)
        q, k = q_TBNH, k_TBGH
        for level in self.levels:
            turned_q, turned_k = rotate(q, tables), _kept(cache, f"k of order {level}", rotate(k, tables))
            turned_k = each_head(turned_k, heads)
            # Two attentions, though their weights are equal: fused kernels never hold these T x T numbers.
            q = self._gated("q", q_TBNH, attend(turned_q, turned_k, q_values))
            k = self._gated("k", k_TBNH, attend(turned_q, turned_k, k_values))
        return q, k

    def _gated(self, side: str, x_TBNH: Tensor, read_BNTH: Tensor) -> Tensor:
        read_TBNH = read_BNTH.permute(2, 0, 1, 3)
        if not self.gates:
            return read_TBNH
        return self.gates[f"{side}_gate"](x_TBNH, read_TBNH)


def _kept(cache: LayerCache | None, name: str, new_BNTH: Tensor) -> Tensor:
    return cache.extend(name, new_BNTH) if cache is not None else new_BNTH


def each_head(x_BGTH: Tensor, heads: int) -> Tensor:
    """[B, G, T, H] -> [B, N, T, H]: what neighbouring heads have in common, for each of them."""
    n_rep = heads // x_BGTH.shape[1]
    return x_BGTH.repeat_interleave(n_rep, dim=1) if n_rep > 1 else x_BGTH

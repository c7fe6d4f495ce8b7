"""The decoder: token embedding, blocks of attention and feed-forward, final norm, untied head.

A decoder is a row of layers: the embedding, each block, the head. `decoder_specs` describes all its
parameters without building anything; `DecoderStage` builds a run of layers, which is the whole decoder or
a pipeline stage of it.

T tokens, B batch, D hidden, V the part of the vocabulary on this rank.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.kernels.cross_entropy import compiled_kernel
from megatron_nexus.models.attention import Attention, attention_specs
from megatron_nexus.models.feed_forward import FeedForward, feed_forward_specs
from megatron_nexus.models.kv_cache import KeyValueCache, LayerCache
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.norm import make_norm, norm_specs
from megatron_nexus.models.packing import Packing, Stream, packing_of
from megatron_nexus.models.parameters import Linear, SpecModule
from megatron_nexus.models.rotary import Tables, stage_tables
from megatron_nexus.parallel.cross_entropy import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_scores,
)
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.cost import attention_flops_per_token, balanced_cuts, weight_flops_per_token
from megatron_nexus.spec.param import Axis, Flow, Layout, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Shard


def _vocabulary(model: ModelConfig) -> Axis:
    return Axis("vocabulary", model.vocab_size, Layout.SHARDED_PADDED)


def embedding_spec(model: ModelConfig) -> ParamSpec:
    """Return the token embedding [vocabulary, D]."""
    axes = (_vocabulary(model), Axis("hidden", model.hidden_size, residual=True))
    flows = (Flow.BOUNDARY, Flow.WRITES)
    return ParamSpec("embedding.weight", axes, Normal(model.init_method_std), Role.LOOKUP, flows)


def head_specs(model: ModelConfig) -> dict[str, tuple[ParamSpec, ...]]:
    """Specs by part: the final norm and the head [vocabulary, D]."""
    axes = (_vocabulary(model), Axis("hidden", model.hidden_size, residual=True))
    init, flows = Normal(model.init_method_std), (Flow.BOUNDARY, Flow.READS)
    return {
        "norm": norm_specs(model, "final_norm", axes[1]),
        "head": (ParamSpec("head.weight", axes, init, Role.MATMUL, flows),),
    }


def layer_parts(model: ModelConfig) -> list[dict[str, tuple[ParamSpec, ...]]]:
    """Return the parameters of each layer by part, in order: embedding, blocks, head."""
    blocks = [
        {
            **attention_specs(model, f"layers.{i}.attention"),
            "feed_forward": (*chain(*feed_forward_specs(model, f"layers.{i}.feed_forward").values()),),
        }
        for i in range(model.num_layers)
    ]
    return [{"embedding": (embedding_spec(model),)}, *blocks, head_specs(model)]


def layer_specs(model: ModelConfig) -> list[list[ParamSpec]]:
    """Return the parameters of each layer, in order: embedding, blocks, head."""
    return [[spec for part in layer.values() for spec in part] for layer in layer_parts(model)]


def decoder_specs(model: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter of the decoder by logical name. Pure: needs no process group and allocates nothing."""
    return {spec.name: spec for layer in layer_specs(model) for spec in layer}


def layer_flops_per_token(model: ModelConfig, seq_length: int) -> list[int]:
    """Return forward FLOPs per token of each layer, attention included (`spec.cost` says what is counted)."""
    embedding, block, head = map(weight_flops_per_token, layer_specs(replace(model, num_layers=1)))
    attention = attention_flops_per_token(model.attention_width, seq_length, model.inner_attention_width)
    return [embedding, *[block + attention] * model.num_layers, head]  # all blocks are alike


def training_flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Forward and backward FLOPs per token: three times forward."""
    return 3 * sum(layer_flops_per_token(model, seq_length))


def stage_layers(model: ModelConfig, seq_length: int, stages: int) -> list[range]:
    """Return each pipeline stage's layers: cut so that the most expensive stage is as cheap as possible."""
    cuts = balanced_cuts(layer_flops_per_token(model, seq_length), stages)
    return [range(*ends) for ends in pairwise(cuts)]


class Embedding(SpecModule):
    """Rows of the embedding matrix, which tensor-parallel ranks share by vocabulary."""

    def __init__(self, model: ModelConfig, context: LayerContext) -> None:
        spec = embedding_spec(model)
        super().__init__({"weight": spec}, context)
        self.tp = context.tp
        self.start, self.stop = context.shard.logical_range(spec.axes[0])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids [B, T] -> x [T, B, D]."""
        tokens_TB = tokens_BT.t()
        elsewhere = (tokens_TB < self.start) | (tokens_TB >= self.stop)
        rows_TB = (tokens_TB - self.start).masked_fill(elsewhere, 0)
        x_TBD = F.embedding(rows_TB, self.get_parameter("weight"))
        return self.tp.leave(x_TBD.masked_fill(elsewhere[..., None], 0.0))


class Block(nn.Module):
    """x + attention(x), then x + feed_forward(x), which hold their norms."""

    def __init__(self, model: ModelConfig, index: int, context: LayerContext) -> None:
        super().__init__()
        self.attention = Attention(model, f"layers.{index}.attention", context, model.has_rotary(index))
        self.feed_forward = FeedForward(model, f"layers.{index}.feed_forward", context)
        self.recompute_all = context.recompute == "full"

    def _run(
        self, x_TBD: Tensor, tables: Tables, packing: Packing | None, cache: LayerCache | None = None
    ) -> Tensor:
        x_TBD = x_TBD + self.attention(x_TBD, tables, packing, cache)
        return x_TBD + self.feed_forward(x_TBD)

    def forward(
        self,
        x_TBD: Tensor,
        tables: Tables,
        packing: Packing | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[T, B, D] -> [T, B, D]; under full recompute only the input is kept for backward."""
        if self.recompute_all and torch.is_grad_enabled():
            return checkpoint(
                self._run, x_TBD, tables, packing, use_reentrant=False, preserve_rng_state=False
            )
        return self._run(x_TBD, tables, packing, cache)


class Head(nn.Module):
    """Final norm and logits."""

    def __init__(self, model: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        specs = head_specs(model)
        self.tp = context.tp
        self.ends_before_head = context.ends_before_head
        self.norm = make_norm(specs["norm"], model, context)
        self.projection = Linear(specs["head"][0], context)

    def forward(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> logits [T, B, V], or what `logits` makes them of."""
        x_TBD = self.norm(x_TBD)
        return x_TBD if self.ends_before_head else self.logits(x_TBD)

    def logits(self, x_TBD: Tensor) -> Tensor:
        """Normed [T, B, D] -> logits [T, B, V]."""
        return self.projection(self.tp.enter(x_TBD))


class DecoderStage(nn.Module):
    """A run of the decoder's layers: token ids or activations in, activations or logits out."""

    def __init__(self, model: ModelConfig, layers: range, context: LayerContext) -> None:
        super().__init__()
        last = model.num_layers + 1
        self.model = model
        self.context = context
        self.layers = nn.ModuleList(
            Embedding(model, context)
            if index == 0
            else Head(model, context)
            if index == last
            else Block(model, index - 1, context)
            for index in layers
        )

    def forward(self, stream: Stream) -> Stream:
        """[B, T] or [T, B, D] -> [T, B, D] or [T, B, V]; positions [B, T] go along up to the logits."""
        x, positions_BT = stream if isinstance(stream, tuple) else (stream, None)
        packing = None
        if positions_BT is not None:
            packing = packing_of(positions_BT, self.context, self.model.sliding_window)
        tables: Tables | None = None
        for layer in self.layers:
            if not isinstance(layer, Block):
                x = layer(x)
                continue
            if tables is None:
                tokens, positions_TB = self.context.tp.tokens(x), packing.positions_TB if packing else None
                tables = stage_tables(self.model, tokens, x, positions_TB)
            x = layer(x, tables, packing)
        return x if positions_BT is None or isinstance(self.layers[-1], Head) else (x, positions_BT)

    @torch.no_grad()
    def decode(self, tokens_BT: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, V] of the token after `tokens_BT`, which follow those in the cache and join them.

        Of a whole decoder, not of a pipeline stage.
        """
        embedding, *blocks, head = self.layers
        packing = cache.advance(tokens_BT.shape[1], tokens_BT.device)
        x_TBD = embedding(tokens_BT)
        tables = stage_tables(self.model, cache.capacity, x_TBD, packing.positions_TB)
        for block, layer_cache in zip(blocks, cache.layers, strict=True):
            x_TBD = block(x_TBD, tables, packing, layer_cache)
        return head(x_TBD[-1:])[0]


def compile_blocks(stage: nn.Module, backend: str | Callable[..., object] = "inductor") -> None:
    """Have torch.compile compile the blocks below `stage`, one compilation for all that are alike.

    Embedding and head stay eager; `Loss` has a flag of its own. The collectives of tensor parallelism are
    within the graphs. Every shape is compiled for itself: those of texts to score are many, and belong under
    `force_eager`.
    """
    for module in stage.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=False, backend=backend)


class Loss:
    """Mean cross entropy of a stage's logits."""

    def __init__(self, model: ModelConfig, tp: TensorParallel, shard: Shard, compiled: bool = False) -> None:
        """`compiled` has torch.compile compile the cross entropy at its first call."""
        self.kernel = compiled_kernel() if compiled else None
        self.vocabulary_range = shard.logical_range(_vocabulary(model))
        self.vocabulary_width = shard.stored(_vocabulary(model))
        self.tp = tp

    def __call__(self, logits_TBV: Tensor, labels_BT: Tensor) -> Tensor:
        """Nats per token, a scalar, the same on every tensor-parallel rank."""
        return vocabulary_parallel_cross_entropy(
            logits_TBV, labels_BT.t(), self.vocabulary_range, self.tp, self.kernel
        )

    def token_scores(self, logits_TBV: Tensor, labels_BT: Tensor) -> Tensor:
        """Return [2, B, T]: the log-probability of each label, and 1 where it is the argmax; no gradient."""
        scores_2TB = vocabulary_parallel_scores(logits_TBV, labels_BT.t(), self.vocabulary_range, self.tp)
        return scores_2TB.transpose(1, 2)

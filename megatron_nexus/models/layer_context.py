"""LayerContext: what every layer is built with besides its own sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_nexus.config.run_config import NormImpl, Recompute, RunConfig
from megatron_nexus.kernels.grouped_linear import grouped_linear
from megatron_nexus.models.activation_observer import ActivationObserver
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Types by their names in --precision."""


def padding_multiple(config: RunConfig, device_type: str) -> int:
    """Return the alignment of split axes per rank: as configured, or what the device's matrix units want."""
    return config.parallel.padding_multiple or (1 if device_type == "cpu" else 64)


def groups_projections(compiled: bool, dtype: torch.dtype, device_type: str) -> bool:
    """Return whether the Nexus-Ranks of one input share products.

    On a GPU, and in compiled bf16. In fp32 a CPU's batched products are slower than as many plain ones.
    """
    return device_type == "cuda" or (compiled and dtype == torch.bfloat16)


def computes_attention_backward(compiled: bool, dtype: torch.dtype, device_type: str) -> bool:
    """Return whether short samples' attention has our backward pass: on a CPU, in compiled bf16."""
    return device_type == "cpu" and compiled and dtype == torch.bfloat16


@dataclass(frozen=True)
class LayerContext:
    """The tensor-parallel ranks, this rank's share, the seed and type of new weights, what is recomputed,
    and whose kernels compute the norms. Without a seed weights are zeros, to be filled from a checkpoint.

    The next two keep the documents of a packed sample apart: see `packing`. `group_projections` has the
    Nexus-Ranks of one input use fewer, larger products; `attention_backward` has attention
    of short samples computed by `kernels.causal_attention`; `flex_attention` has the blocks, which are then
    compiled, keep documents apart by FlexAttention. `ends_before_head` leaves the head's product to the loss.
    """

    tp: TensorParallel
    shard: Shard
    seed: int | None
    dtype: torch.dtype = torch.float32
    recompute: Recompute = "none"
    norm_impl: NormImpl = "torch"
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    group_projections: bool = False
    attention_backward: bool = False
    flex_attention: bool = False
    ends_before_head: bool = False
    observer: ActivationObserver = field(default_factory=ActivationObserver)

    def linear_after(self, activation: Callable[..., Tensor], weight: Tensor, *inputs: Tensor) -> Tensor:
        """linear(activation(*inputs), weight), which keeps only `inputs` under selective recompute.

        The checkpoint ends early, before the product: backward repeats the activation alone.
        """
        activation = self.observer.around(activation, [weight])
        return self._after(activation, lambda x: F.linear(x, weight), *inputs)

    def grouped_linear_after(
        self, activation: Callable[..., Tensor], weights: list[Tensor], inputs: Tensor
    ) -> Tensor:
        """`linear_after` of several maps at once, as `grouped_linear` has them."""
        checkpointed = self.recompute == "selective"
        activation = self.observer.around(activation, weights)
        return self._after(activation, lambda x: grouped_linear(x, weights, checkpointed), inputs)

    def _after(
        self, activation: Callable[..., Tensor], product: Callable[[Tensor], Tensor], *inputs: Tensor
    ) -> Tensor:
        if self.recompute != "selective":
            return product(activation(*inputs))

        def run(*inputs: Tensor) -> Tensor:
            return product(activation(*inputs))

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)

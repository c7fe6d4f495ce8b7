"""Linear cross entropy: the product of the head and the loss in one, by DeepSpeed. Sealed for `deepspeed`.

The logits are there for a few tokens at a time, backward for a few columns, and computed in both. So a step
holds no T x B x V numbers, and the head's FLOPs are 4 / 3. Over tensor-parallel ranks a block takes two
all-reduces forward, and the gradient of the input one backward.

T tokens, B batch, N = T B, D hidden, V the part of the vocabulary on this rank.
"""

from collections.abc import Callable
from math import inf

import torch.distributed as dist
from deepspeed.sequence.linear_cross_entropy import _VocabParallelLinearCrossEntropy
from torch import Tensor, nn

from megatron_nexus.kernels.cross_entropy import linear_block_rows
from megatron_nexus.models.decoder import Head
from megatron_nexus.parallel.tensor_parallel import TensorParallel

_NO_LABEL = -1
"""Is no label: every token has a loss."""


class LinearCrossEntropy:
    """Mean cross entropy of what a stage that `ends_before_head` returns."""

    def __init__(
        self,
        vocabulary_range: tuple[int, int],
        tp: TensorParallel,
        group: dist.ProcessGroup | None,
        block_rows: Callable[[int, int], int] = linear_block_rows,
    ) -> None:
        """`group` are the ranks of `tp`, None where there is one; `block_rows` of (N, V) tokens at a time."""
        self._range, self._tp, self._group, self._block_rows = vocabulary_range, tp, group, block_rows
        self._head: Head | None = None

    def bind(self, model: nn.Module) -> None:
        """Use the head that is in `model`, if there is one: pipeline stages before the last have none."""
        self._head = next((module for module in model.modules() if isinstance(module, Head)), None)

    @property
    def head(self) -> Head:
        """The head of this rank."""
        assert self._head is not None, "asked for on the last stage alone"
        return self._head

    def __call__(self, x_TBD: Tensor, labels_BT: Tensor) -> Tensor:
        """Nats per token, a scalar, the same on every tensor-parallel rank."""
        start, stop = self._range
        weight_VD: Tensor = self.head.projection.get_parameter("weight")
        rows = self._block_rows(labels_BT.numel(), len(weight_VD))
        padding_logit = None
        if start == stop:  # padding alone: one column, of probability 0
            weight_VD, padding_logit = weight_VD[:1], weight_VD.new_full((1,), -inf)
        elif stop - start < len(weight_VD):
            weight_VD = weight_VD[: stop - start]  # the rest is padding
        x_ND = self._tp.enter_summed(x_TBD).flatten(0, 1).contiguous()
        # The public function checks labels and ranges: three waits for the GPU, and a collective.
        losses_N = _VocabParallelLinearCrossEntropy.apply(
            x_ND,
            weight_VD,
            padding_logit,
            labels_BT.t().flatten(),
            self._group,
            start,
            stop,
            _NO_LABEL,
            rows,
            weight_VD.dtype,
        )
        return losses_N.mean()

    def of_logits(self, output: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of what the stage returns, and labels, for one of logits and labels."""
        return lambda x_TBD, labels_BT: output(self.head.logits(x_TBD), labels_BT)

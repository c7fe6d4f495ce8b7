"""Linear: a plain matrix in the shape that its spec gives it on this rank, stored [out, in]."""

from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.parameters import SpecModule
from megatron_nexus.spec.param import ParamSpec


class Linear(SpecModule):
    """Y = X W, no bias."""

    def __init__(self, weight: ParamSpec, context: LayerContext) -> None:
        super().__init__({"weight": weight}, context.shard, context.seed, context.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Its share of Y: columns of it, or a partial sum, as the layouts of W's axes have it."""
        return F.linear(x, self.get_parameter("weight"))

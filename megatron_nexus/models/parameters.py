"""Parameters of a module: allocated, filled and marked from their specs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.spec.initialise import local_values
from megatron_nexus.spec.param import ParamSpec


class SpecModule(nn.Module):
    """A module whose parameters are described by specs.

    `specs` maps the attribute that holds a parameter to its spec. The parameters live in the module whose
    forward uses them, as ZeRO-3 asks: it gathers a module's own parameters before its forward.
    """

    def __init__(self, specs: dict[str, ParamSpec], context: LayerContext) -> None:
        super().__init__()
        self.specs = specs
        shard, seed = context.shard, context.seed
        for attribute, spec in specs.items():
            if seed is None:
                values = torch.zeros(shard.local_shape(spec), dtype=context.dtype)
            else:
                values = local_values(spec, shard, seed).to(context.dtype)
            parameter = nn.Parameter(values)
            # Read by DeepSpeed: without it the gradient norm counts only one rank's part.
            parameter.tensor_model_parallel = spec.is_sharded  # type: ignore[attr-defined]
            self.register_parameter(attribute, parameter)


class Linear(SpecModule):
    """Y = X W without bias, W stored [out, in] in the shape that its spec gives it on this rank."""

    def __init__(self, weight: ParamSpec, context: LayerContext) -> None:
        super().__init__({"weight": weight}, context)

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's part of Y: columns of it, or a partial sum, as the layouts of W's axes say."""
        return F.linear(x, self.get_parameter("weight"))


def logical_parameters(module: nn.Module) -> dict[str, tuple[ParamSpec, nn.Parameter]]:
    """Return every parameter below `module` with its spec, by logical name."""
    return {
        spec.name: (spec, child.get_parameter(attribute))
        for child in module.modules()
        if isinstance(child, SpecModule)
        for attribute, spec in child.specs.items()
    }

"""Parameters of a module: allocated, filled and marked from their specs."""

import torch
from torch import nn

from megatron_nexus.spec.initialise import local_values
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Shard


class SpecModule(nn.Module):
    """A module whose parameters are described by specs.

    `specs` maps the attribute that holds a parameter to its spec. The parameters live in the module whose
    forward uses them, as ZeRO-3 asks: it gathers a module's own parameters before its forward.
    """

    def __init__(
        self, specs: dict[str, ParamSpec], shard: Shard, seed: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.specs = specs
        for attribute, spec in specs.items():
            if seed is None:
                values = torch.zeros(shard.local_shape(spec), dtype=dtype)
            else:
                values = local_values(spec, shard, seed).to(dtype)
            parameter = nn.Parameter(values)
            # Read by DeepSpeed: without it the gradient norm counts only one rank's part.
            parameter.tensor_model_parallel = spec.is_sharded  # type: ignore[attr-defined]
            self.register_parameter(attribute, parameter)


def logical_parameters(module: nn.Module) -> dict[str, tuple[ParamSpec, nn.Parameter]]:
    """Every parameter below `module` with its spec, by logical name."""
    return {
        spec.name: (spec, child.get_parameter(attribute))
        for child in module.modules()
        if isinstance(child, SpecModule)
        for attribute, spec in child.specs.items()
    }

"""The toy model of test_checkpoint_engines.py: two layers whose parameters come from specs."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nexus.spec.initialise import local_values
from megatron_nexus.spec.param import Axis, Constant, Layout, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Shard

D, M = 7, 13  # odd, so that every shard, range and buffer is padded
WIDTH, INNER = Axis("hidden", D), Axis("inner", M, Layout.SHARDED_PADDED)
FIRST_STAGE = [
    ParamSpec("up.weight", (INNER, WIDTH), Normal(0.3), Role.MATMUL),
    ParamSpec("up.gain", (WIDTH,), Constant(1.0), Role.VECTOR),
]
LAST_STAGE = [
    ParamSpec("down.weight", (WIDTH, INNER), Normal(0.3), Role.MATMUL),
    ParamSpec("down.gain", (WIDTH,), Constant(1.0), Role.VECTOR),
]


class Layer(nn.Module):
    """Parameters from specs."""

    def __init__(self, specs: list[ParamSpec], shard: Shard) -> None:
        super().__init__()
        self.specs = specs
        for spec in specs:
            parameter = nn.Parameter(local_values(spec, shard, seed=1))
            parameter.tensor_model_parallel = spec.is_sharded
            self.register_parameter(spec.name.split(".")[1], parameter)

    def named(self) -> Iterator[tuple[ParamSpec, nn.Parameter]]:
        for spec in self.specs:
            yield spec, self.get_parameter(spec.name.split(".")[1])


class Up(Layer):
    def __init__(self, shard: Shard) -> None:
        super().__init__(FIRST_STAGE, shard)

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD.to(self.weight.dtype)
        return torch.cat([F.gelu(x_BD @ self.weight.T), x_BD * self.gain], dim=-1)


class Down(Layer):
    def __init__(self, shard: Shard) -> None:
        super().__init__(LAST_STAGE, shard)

    def forward(self, joined: Tensor) -> Tensor:
        hidden_BM, gated_BD = joined[:, :-D], joined[:, -D:]
        return torch.cat([hidden_BM @ self.weight.T, gated_BD * self.gain], dim=-1)


def loss_of(output: Tensor, label: Tensor) -> Tensor:
    return F.mse_loss(output.float(), label)


class Toy(nn.Module):
    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Up(shard), Down(shard)])

    def forward(self, x_BD: Tensor, label: Tensor) -> Tensor:
        return loss_of(self.layers[1](self.layers[0](x_BD)), label)

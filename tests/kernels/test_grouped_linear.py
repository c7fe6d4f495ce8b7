"""Law: linear maps put together equal the maps one by one, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_nexus.kernels.grouped_linear import concatenated_linear, grouped_linear

# Norms, relative. bfloat16: a gradient of x is the sum of three numbers, each rounded by 2^-9 if apart.
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}


def distance(mine: Tensor, expected: Tensor) -> float:
    return float((mine.double() - expected.double()).norm().detach() / expected.double().norm().detach())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_maps_put_together_equal_the_maps_one_by_one(grouped: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, outputs, shape = 33, 20, (7, 2)
    weights = [torch.randn(outputs, inputs, dtype=dtype, requires_grad=True) for _ in range(3)]
    x = torch.randn(*((3, *shape) if grouped else shape), inputs, dtype=dtype, requires_grad=True)
    one_by_one = [F.linear(x[g] if grouped else x, w) for g, w in enumerate(weights)]
    expected = torch.stack(one_by_one) if grouped else torch.cat(one_by_one, dim=-1)
    mine = (grouped_linear if grouped else concatenated_linear)(x, weights)
    assert mine.shape == expected.shape
    upstream = torch.randn_like(expected)
    pairs = zip(
        [mine, *torch.autograd.grad(mine, [x, *weights], upstream)],
        [expected, *torch.autograd.grad(expected, [x, *weights], upstream)],
        strict=True,
    )
    assert max(distance(a, b) for a, b in pairs) < BOUND[dtype]

"""Pattention and its LayerNorm where the float64 laws do not look: zeros, and half precision."""

import dataclasses

import pytest
import torch

from megatron_nexus.models.feed_forward import FeedForward
from megatron_nexus.models.norm import NonParametricLayerNorm
from megatron_nexus.models.pattention import Pattention, squared_length
from tests.models.test_decoder import ALONE, MODEL, MODELS

TOKENFORMER = dataclasses.replace(MODEL, **MODELS["tokenformer"])


def pattention() -> Pattention:
    inner = FeedForward(TOKENFORMER, "f", ALONE).inner
    assert isinstance(inner, Pattention)
    return inner


def test_an_input_of_zeros_gives_zeros_and_no_gradient() -> None:
    """A vector of length zero has no direction: 0 / 0 must reach neither outputs nor weights."""
    layer, x_TBD = pattention(), torch.randn(3, 2, MODEL.hidden_size, dtype=torch.float64)
    x_TBD[1, 0] = 0.0
    x_TBD.requires_grad_()
    (y_TBD,) = layer(x_TBD)
    assert not y_TBD[1, 0].any() and y_TBD[1, 1].all()
    y_TBD.square().sum().backward()
    assert x_TBD.grad is not None and not x_TBD.grad[1, 0].any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_it_does_not_see_the_length_of_its_input() -> None:
    layer, x_TBD = pattention(), torch.randn(3, 2, MODEL.hidden_size, dtype=torch.float64)
    assert torch.allclose(layer(x_TBD)[0], layer(1e-3 * x_TBD)[0], rtol=0.0, atol=1e-12)


def test_statistics_are_of_float32_whatever_the_activations_are() -> None:
    # Squares added up in 8 bits would stop growing at a few hundred, in float32 they are right to 1e-5.
    a = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = a.double().square().sum(dim=-1, keepdim=True)
    found = squared_length(a)
    assert found.dtype is torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("born", [0, 17])
def test_layer_norm_has_no_parameters_and_keeps_its_type(born: int) -> None:
    norm = NonParametricLayerNorm(dataclasses.replace(TOKENFORMER, base_hidden_size=born))
    assert not [*norm.parameters()]
    x = torch.randn(3, 2, MODEL.hidden_size, generator=torch.Generator().manual_seed(0)) + 2.0
    half = norm(x.bfloat16())
    assert half.dtype is torch.bfloat16
    # Eight bits of the input and of the output.
    assert torch.allclose(half.float(), norm(x), rtol=0.0, atol=0.05)

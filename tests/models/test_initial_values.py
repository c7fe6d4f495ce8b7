"""Law: initial q, k, v have the scale of linear projections, a third of it in Nexus-Rank, for any M and A."""

import dataclasses
import math

import pytest
import torch

from megatron_nexus.config.command_line import build
from megatron_nexus.config.model_config import ModelConfig
from megatron_nexus.config.presets import PRESETS
from megatron_nexus.models.attention import attention_specs
from megatron_nexus.models.feed_forward import feed_forward_specs
from megatron_nexus.models.layer_context import LayerContext
from megatron_nexus.models.nexus_rank import NexusRank, attention_widths, feed_forward_widths
from megatron_nexus.models.projections import make_projections
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.shard import Shard

ALONE = LayerContext(TensorParallel(None), Shard(0, 1), seed=3)
# Of the law; what 128 tokens of one layer show is within a quarter.
FACTOR = 2.0


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def tokens(width: int) -> torch.Tensor:
    """128 vectors of RMS 1, as the norm before a projection gives them."""
    return torch.randn(128, 1, width, generator=torch.Generator().manual_seed(0))


def expected(model: ModelConfig) -> float:
    """RMS of q, k and v for inputs of RMS 1."""
    linear = model.init_method_std * math.sqrt(model.hidden_size)
    return linear / 3 if model.projection == "nexus" else linear


@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=() if name.endswith("-tiny") else pytest.mark.slow) for name in PRESETS],
)
@torch.no_grad()
def test_queries_keys_and_values_have_the_scale_of_linear_projections(preset: str) -> None:
    model = build({"preset": preset}).model
    specs = attention_specs(model, "layers.0.attention")
    maps = make_projections(model, {name: specs[name] for name in "qkv"}, ALONE)
    for y in maps(tokens(model.hidden_size)):
        assert expected(model) / FACTOR < rms(y) < expected(model) * FACTOR


TINY = build({"preset": "nexusformer-tiny"}).model
NORM = {"nexus_inner_norm": True}
WIDTH = {**NORM, "nexus_inner_norm_scale": "width"}


@pytest.mark.parametrize("norm", [{}, NORM, WIDTH], ids=["no norm", "norm to sqrt(D)", "norm to sqrt(width)"])
@pytest.mark.parametrize("widths", [(128, 128), (160, 192), (512, 1024)])
@torch.no_grad()
def test_the_scale_depends_on_neither_m_nor_a(widths: tuple[int, int], norm: dict[str, object]) -> None:
    nexus_m, nexus_a = widths
    model = dataclasses.replace(TINY, nexus_m=nexus_m, nexus_a=nexus_a, **norm)
    specs = attention_specs(model, "layers.0.attention")
    module = NexusRank({name: specs[name] for name in "qkv"}, attention_widths(model), ALONE)
    for y in module(tokens(model.hidden_size)):
        # Widths of 128 and more concentrate; what is left is that activations are not exactly normal.
        assert rms(y) == pytest.approx(expected(model), rel=0.15)


@torch.no_grad()
def test_output_and_feed_forward_have_a_third_of_the_scale_of_linear_writers() -> None:
    """Those of the residual stream are smaller by the root of twice the layers."""
    model = build({"preset": "nexusformer-released-tiny"}).model
    writer = model.init_method_std * math.sqrt(model.hidden_size) / math.sqrt(2 * model.num_layers)
    output = attention_specs(model, "layers.0.attention")["output"]
    stages = feed_forward_specs(model, "layers.0.feed_forward")["stages"]
    for specs, widths in ((output, attention_widths(model)), (stages, feed_forward_widths(model))):
        (y,) = NexusRank({"y": specs}, widths, ALONE)(tokens(model.hidden_size))
        assert rms(y) == pytest.approx(writer / 3, rel=0.15)

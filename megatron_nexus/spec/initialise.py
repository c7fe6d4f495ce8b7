"""Initial values from (seed, parameter name, element) alone, so all topologies start alike, bit for bit."""

import numpy as np
import torch

from megatron_nexus.spec.element_draws import draw_box
from megatron_nexus.spec.param import Constant, ParamSpec
from megatron_nexus.spec.shard import Box, Shard


def logical_values(spec: ParamSpec, seed: int, box: Box) -> np.ndarray:
    """Initial values of the part `box` of the logical tensor, float32."""
    if isinstance(spec.init, Constant):
        return np.full(box.sizes, spec.init.value, dtype=np.float32)
    values = draw_box(f"{seed}:{spec.name}", spec.shape, box, _standard_normal, np.float32)
    values *= np.float32(spec.init.std)
    return values


def _standard_normal(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.standard_normal(count, dtype=np.float32)


def local_values(spec: ParamSpec, shard: Shard, seed: int) -> torch.Tensor:
    """Initial values of this rank's tensor, float32 on the CPU, with zeros in the padding."""
    box = shard.box(spec)
    local = torch.zeros(shard.local_shape(spec), dtype=torch.float32)
    if box.numel:
        local[box.index_at_origin] = torch.from_numpy(logical_values(spec, seed, box))
    return local

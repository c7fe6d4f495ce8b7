"""Sketches of gradients: K sums of signed elements that keep inner products (count sketch).

    h_b = sum over elements i with bin(i) = b of sign(i) g_i        <h(q), h(g)> estimates <q, g>

Bin and sign are drawn for each element of a logical tensor from (seed, K, tensor name, element) alone, so a
rank sketches what it holds of a gradient, and the sum over ranks is the sketch, whatever the topology. The
product of two sketches is unbiased, with the variance

    ((1 - r^2) + 2 (r^2 - A)) |q|^2 |g|^2 / K        r = cos(q, g), A = sum q_i^2 g_i^2 / (|q|^2 |g|^2)

(Charikar, Chen and Farach-Colton, 2002; for cosines of many elements, A near 0, about 1 / K.) A bin and a
sign are one code below 2 K: element i is added to sum number code(i), and h is the first K sums minus the
last K. That costs one pass over the gradient, and 4 bytes an element for the codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.element_draws import draw_box
from megatron_nexus.spec.param import ParamSpec
from megatron_nexus.spec.shard import Box, Shard


@dataclass(frozen=True)
class Bins:
    """Which sum each element of a model's parameters is added to."""

    size: int
    """K, numbers of a sketch."""
    seed: int
    offsets: Mapping[str, int] | None = None
    """Where each tensor begins among all elements, where each element has a bin of its own and no sign."""

    @property
    def sums(self) -> int:
        """How many sums are kept, the last of them of padding."""
        return (self.size if self.offsets is not None else 2 * self.size) + 1

    def codes(self, spec: ParamSpec, box: Box) -> np.ndarray:
        """Return the sum that each element in a part of a logical tensor is added to, int32."""
        if self.offsets is not None:
            indices = np.arange(spec.numel, dtype=np.int32).reshape(spec.shape)
            return indices[box.index] + np.int32(self.offsets[spec.name])
        key = f"sketch:{self.seed}:{self.size}:{spec.name}"
        return draw_box(key, spec.shape, box, self._draw, np.int32)

    def _draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        return generator.integers(0, 2 * self.size, count, dtype=np.int32)

    def fold(self, sums: Tensor) -> Tensor:
        """Return sketches [..., K] of sums [..., 2 K + 1]."""
        if self.offsets is not None:
            return sums[..., : self.size].clone()
        return sums[..., : self.size] - sums[..., self.size : 2 * self.size]


def make_bins(specs: Mapping[str, ParamSpec], size: int, seed: int) -> Bins:
    """Return the bins of a model's parameters; `size` 0 gives each element its own: the gradient itself."""
    if size:
        return Bins(size, seed)
    ends = np.cumsum([spec.numel for spec in specs.values()]).tolist()
    return Bins(ends[-1], seed, dict(zip(specs, [0, *ends], strict=False)))


class Sketcher:
    """Sketches the gradients of a stage's parameters while backward computes them.

    Each is added to the sums and freed as soon as it is there, so that backward never holds all of them.
    `scales` multiply the elements of this rank's tensors before. With `per_tensor` each logical tensor's
    gradient is divided by its norm.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[ParamSpec, nn.Parameter]],
        bins: Bins,
        shard: Shard,
        tp: TensorParallel,
        scales: Mapping[str, Tensor],
        per_tensor: bool = False,
    ) -> None:
        self._bins = bins
        self._tp = tp
        self._scales = scales
        self._per_tensor = per_tensor
        first = next(iter(parameters.values()))[1]
        dtype = torch.promote_types(first.dtype, torch.float32)
        rows = len(parameters) if per_tensor else 1
        self._sums = torch.zeros(rows, bins.sums, dtype=dtype, device=first.device)
        self._squares = torch.zeros(len(parameters), dtype=dtype, device=first.device)
        for number, (name, (spec, parameter)) in enumerate(parameters.items()):
            # What all tensor-parallel ranks hold is the first one's to add.
            codes = self._codes(spec, shard, parameter) if spec.is_sharded or shard.rank == 0 else None
            parameter.register_post_accumulate_grad_hook(self._hook(number, name, codes))

    def _codes(self, spec: ParamSpec, shard: Shard, parameter: nn.Parameter) -> Tensor:
        """Return the code of each element of this rank's tensor; padding has a sum that is never read."""
        box = shard.box(spec)
        codes = np.full(shard.local_shape(spec), self._bins.sums - 1, np.int32)
        if box.numel:
            codes[box.index_at_origin] = self._bins.codes(spec, box)
        return torch.from_numpy(codes).flatten().to(parameter.device)

    def _hook(self, number: int, name: str, codes: Tensor | None) -> Callable[[Tensor], None]:
        row, scale = number if self._per_tensor else 0, self._scales.get(name)

        def add(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if codes is None:
                return
            assert grad is not None, f"{name} has no gradient"
            values = grad.flatten().to(self._sums.dtype)
            if scale is not None:
                values = values * scale.flatten()
            self._sums[row].index_add_(0, codes, values)
            if self._per_tensor:
                self._squares[number] += values @ values

        return add

    def take(self) -> Tensor:
        """Return this rank's part of the sketch of the gradients since the last call, [K].

        With `per_tensor` a collective call of the tensor-parallel ranks, of one number for each tensor.
        """
        sketches = self._bins.fold(self._sums)
        if self._per_tensor:
            norms = self._tp.sum(self._squares.clone()).sqrt()
            weights = torch.where(norms > 0, 1.0 / norms, 0.0)
            found = weights @ sketches
        else:
            found = sketches[0]
        self._sums.zero_()
        self._squares.zero_()
        return found

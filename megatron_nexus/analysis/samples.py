"""Samples of base weights and of grown weights: the same elements at every checkpoint, read box by box."""

import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_nexus.base.invocation import command
from megatron_nexus.checkpoint.chunks import split_box
from megatron_nexus.checkpoint.data_file import DTYPE, Array
from megatron_nexus.checkpoint.store import StateReader
from megatron_nexus.errors import CheckpointError
from megatron_nexus.spec.param import ParamSpec, Role
from megatron_nexus.spec.shard import Box

PIECE_ELEMENTS = 1 << 20
"""Elements of a matrix that are in memory at once."""
ALL = "all"
_BLOCK = re.compile(r"layers\.(\d+)\.(.+)")

Region = tuple[tuple[str, Box], ...]
"""Parts of tensors, in order: one population of weights."""
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Matrices that are compared as one: all, a layer, a kind, or one matrix; base weights and grown ones."""

    name: str
    base: Region
    grown: Region


@dataclass(frozen=True)
class Sample:
    """Weights of a group, float32, drawn without replacement; all of them where there are no more."""

    base: Array
    grown: Array


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Return (3, "attention.q.w_m") for "layers.3.attention.q.w_m"; a matrix of no layer has None."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def make_groups(
    specs: Mapping[str, ParamSpec],
    boxes: Mapping[str, Sequence[tuple[Box, int]]],
    growth: int,
    whole: bool,
    layers: Collection[int] | None,
) -> list[Group]:
    """Return the groups of the matrices of those kinds that `growth` enlarged, coarse ones first.

    `boxes` has the growth that added each part of a tensor: base weights are older than `growth`, grown ones
    are those that it added or, with `whole`, all that the enlarged matrix then held. `layers` None: all.
    """
    matrices = [name for name, spec in specs.items() if spec.role is Role.MATMUL]
    kinds = {layer_and_kind(name)[1] for name in matrices if any(n == growth for _, n in boxes[name])}
    regions: dict[tuple[str, str], tuple[list[tuple[str, Box]], list[tuple[str, Box]]]] = {
        (ALL, ALL): ([], [])
    }
    for name in matrices:
        layer, kind = layer_and_kind(name)
        if kind not in kinds or (layers is not None and layer not in layers):
            continue
        for key in ((ALL, ALL), ("layer", f"layer {layer}"), ("kind", kind), ("matrix", name)):
            base, grown = regions.setdefault(key, ([], []))
            base += [(name, box) for box, number in boxes[name] if number < growth]
            grown += [
                (name, box) for box, number in boxes[name] if number == growth or (whole and number < growth)
            ]
    levels = [ALL, "layer", "kind", "matrix"]
    ordered = sorted(regions.items(), key=lambda item: levels.index(item[0][0]))
    return [Group(name, tuple(base), tuple(grown)) for (_, name), (base, grown) in ordered]


def read_samples(reader: StateReader, groups: Sequence[Group], count: int, seed: int) -> dict[str, Sample]:
    """Draw at most `count` weights of each side of each group, and read them, every matrix once.

    Which elements are drawn depends on seed, group and region only: not on topology or step.

    Raises CheckpointError.
    """
    samples = {}
    # Per box: where its elements go, and which of it they are.
    takers: dict[tuple[str, Box], list[tuple[Array, Numbers]]] = {}
    for group in groups:
        sides = []
        for side, region in (("base", group.base), ("grown", group.grown)):
            ends = np.cumsum([0, *(box.numel for _, box in region)])
            total = int(ends[-1])
            rng = np.random.default_rng([seed, zlib.crc32(f"{group.name} {side}".encode())])
            chosen = np.arange(total)
            if count < total:
                chosen = np.sort(rng.choice(total, count, replace=False, shuffle=False))
            values = np.empty(len(chosen), DTYPE)
            cuts = np.searchsorted(chosen, ends)
            for place, first, start, stop in zip(region, ends, cuts, cuts[1:], strict=False):
                if start < stop:
                    takers.setdefault(place, []).append((values[start:stop], chosen[start:stop] - first))
            sides.append(values)
        samples[group.name] = Sample(*sides)
    for (tensor, box), wanted in takers.items():
        _fill(reader, tensor, box, wanted)
    if not all(
        np.isfinite(side).all() for sample in samples.values() for side in (sample.base, sample.grown)
    ):
        raise CheckpointError(
            f"{reader.folder}: weights are not finite: {command('inspect')} --verify names the tensors; "
            "move the checkpoint elsewhere, and analyze the others"
        )
    return samples


def _fill(reader: StateReader, tensor: str, box: Box, wanted: Sequence[tuple[Array, Numbers]]) -> None:
    """Read the elements of a box that are wanted, by their row-major numbers in it, piece by piece."""
    first = 0
    for piece in split_box(box, PIECE_ELEMENTS):
        stop = first + piece.numel
        spans = [np.searchsorted(numbers, (first, stop)) for _, numbers in wanted]
        if any(start < end for start, end in spans):
            held = reader.read_box(tensor, "fp32", piece).reshape(-1)
            for (values, numbers), (start, end) in zip(wanted, spans, strict=True):
                values[start:end] = held[numbers[start:end] - first]
        first = stop

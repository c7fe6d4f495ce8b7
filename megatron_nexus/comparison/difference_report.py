"""Difference report: the first difference of two recordings in one line, what is known of it, the next."""

import re
from collections.abc import Iterator

from megatron_nexus.base.table import table
from megatron_nexus.comparison.first_difference import Comparison, Difference
from megatron_nexus.comparison.recording import Key, Phase, Recording

SHOWN = 6

WORDS = {
    "embedding": "embedding output",
    "input": "block input",
    "attention": "attention output",
    "attention.norm": "norm before the attention",
    "attention.q": "queries",
    "attention.k": "keys",
    "attention.v": "values",
    "attention.q_norm": "normed queries",
    "attention.k_norm": "normed keys",
    "attention.q_refined": "refined queries",
    "attention.k_refined": "refined keys",
    "attention.heads": "heads before the output projection",
    "feed_forward": "feed-forward output",
    "feed_forward.norm": "norm before the feed-forward",
    "head.input": "input of the head",
    "final_norm": "final norm",
    "head.logits": "logits",
}
"""Activations in words, by their name within a layer."""


def in_words(key: Key) -> str:
    """Return a tensor in words with its name, such as "layer 3, attention output (layers.3.attention)"."""
    layer, name = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)", key.name).groups()  # type: ignore[union-attr]
    match key.phase:
        case Phase.WEIGHTS:
            words = key.name
        case Phase.OPTIMIZER:
            parameter, _, state = key.name.rpartition(".")
            words = f"{'master weights' if state == 'fp32' else state} of {parameter}"
        case Phase.BACKWARD if name.endswith(".grad"):
            words = f"gradient of {key.name.removesuffix('.grad')}"
        case Phase.DATA | Phase.LOSS | Phase.NORM:
            words = key.name
        case _:
            what = WORDS.get(name)
            if what is None and name.endswith(".input"):
                what = f"units that {name.removesuffix('.input')} reads"
            grad = "gradient of " if key.phase is Phase.BACKWARD else ""
            words = f"{grad}{what or name} ({key.name})"
    return f"layer {layer}, {words}" if layer is not None else words


def report(a: Recording, b: Recording, found: Comparison, every: bool = False) -> Iterator[str]:
    """Yield the lines of a comparison; `every`: all that differs, else the first few."""
    for side, recording in (("A", a), ("B", b)):
        run = recording.run
        yield f"{side}: {run.layout}, {run.dtype}, {run.steps} steps"
    if not found.differences:
        yield f"no difference: {found.compared} tensors agree, the furthest apart to {found.closest:.1g}"
        return
    first = found.differences[0]
    yield ""
    yield f"first difference: {_head(first)}; {found.before} tensors before it agree to {found.closest:.1g}"
    yield from (f"  {line}" for line in _details(first, a))
    rest = found.differences[1 : None if every else SHOWN + 1]
    if rest:
        yield f"then {len(found.differences) - 1} of the {found.compared - found.before - 1} that follow:"
        rows = [
            [
                f"  {_when(one.key)}",
                in_words(one.key),
                f"{one.only} alone" if one.only else f"{one.apart:.3g}",
            ]
            for one in rest
        ]
        yield from table(rows, "<<>")


def _when(key: Key) -> str:
    return f"step {key.step}, {key.phase}"


def _head(one: Difference) -> str:
    words = in_words(one.key)
    if one.only:
        other = "B" if one.only == "A" else "A"
        return f"{_when(one.key)}, {words}: {one.only} alone has it, {other} never comes there"
    what = _when(one.key) + (f", {words}" if words != one.key.phase else "")
    if one.copies is not None and not one.count:
        side, copies = one.copies
        return (
            f"{what}: replicas differ in {side}, ranks {copies.ranks[0]} and {copies.ranks[1]}, "
            f"by {copies.difference:.3g}, beyond {one.tolerance:.1g}"
        )
    return f"{what}: {one.largest:.3g} apart, beyond {one.tolerance:.1g}"


def _details(one: Difference, a: Recording) -> Iterator[str]:
    if one.count:
        names = [
            f"{axis.name} {a.run.samples[i] if axis.name == 'sample' else i}"
            for axis, i in zip(a.axes(one.key), one.index, strict=True)
        ]
        yield f"A {one.values[0]:.9g}, B {one.values[1]:.9g} at {', '.join(names)}"
        yield f"{one.count:,} of {one.size:,} elements differ" + (f": {one.places}" if one.places else "")
    if one.copies is not None and one.count:
        side, copies = one.copies
        ranks = f"ranks {copies.ranks[0]} and {copies.ranks[1]}"
        yield f"replicas differ in {side}: {ranks}, by {copies.difference:.3g}"
    yield from one.hints

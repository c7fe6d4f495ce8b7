"""Growth of a parameter: the blocks cover the larger tensor once, and each new path has one zero."""

import numpy as np
import pytest

from megatron_nexus.spec.growth_rule import Fill, Init, grown_boxes, inserted_boxes, segments
from megatron_nexus.spec.param import Axis, Constant, Flow, Normal, ParamSpec, Role

READS, WRITES = Flow.READS, Flow.WRITES


def spec(out: Axis, inp: Axis, flow: Flow = WRITES) -> ParamSpec:
    return ParamSpec("w", (out, inp), Normal(1.0), Role.MATMUL, (flow, READS))


def axes(name: str, old: int, new: int, residual: bool = False) -> tuple[Axis, Axis]:
    return Axis(name, old, residual=residual), Axis(name, new, residual=residual)


def fills(old: ParamSpec, new: ParamSpec, init: Init) -> dict[tuple[int, ...], Fill]:
    return {block.box.offsets: block.fill for block in grown_boxes(old, new, init)}


M, A, D = axes("m", 3, 5), axes("a", 4, 9), axes("hidden", 2, 6, residual=True)


def test_new_units_are_appended() -> None:
    assert [(s.start, s.stop, s.old) for s in segments(*M)] == [(0, 3, 0), (3, 5, None)]
    assert [(s.start, s.stop, s.old) for s in segments(M[0], M[0])] == [(0, 3, 0)]


def test_new_channels_end_their_group_and_new_groups_the_axis() -> None:
    old, new = Axis("heads", 4, group=2), Axis("heads", 9, group=3)
    assert [(s.start, s.stop, s.old, s.inner) for s in segments(old, new)] == [
        (0, 2, 0, False),
        (2, 3, None, True),
        (3, 5, 2, False),
        (5, 6, None, True),
        (6, 9, None, False),
    ]


def test_blocks_cover_the_new_tensor_once_and_keep_all_of_the_old() -> None:
    old = spec(Axis("heads", 6, group=2), A[0])
    new = spec(Axis("heads", 20, group=5), A[1])
    covered, kept = np.zeros(new.shape, int), np.zeros(old.shape, int)
    for block in grown_boxes(old, new, "out_rand"):
        covered[tuple(slice(o, o + s) for o, s in zip(block.box.offsets, block.box.sizes, strict=True))] += 1
        assert (block.old is not None) == (block.fill is Fill.KEPT)
        if block.old:
            assert block.old.sizes == block.box.sizes
            kept[tuple(slice(o, o + s) for o, s in zip(block.old.offsets, block.old.sizes, strict=True))] += 1
    assert (covered == 1).all()
    assert (kept == 1).all()


@pytest.mark.parametrize(
    ("init", "w_m", "no", "on", "nn", "w_d"),
    [
        ("out_rand", "zero", "random", "zero", "random", "random"),
        ("in_rand", "random", "zero", "random", "random", "zero"),
        ("zero", "zero", "zero", "zero", "zero", "zero"),
        ("noise", "noise", "noise", "noise", "noise", "noise"),
        ("random", "random", "random", "random", "random", "random"),
    ],
)
def test_nexus_rank_grows_as_the_table_says(
    init: Init, w_m: str, no: str, on: str, nn: str, w_d: str
) -> None:
    assert fills(spec(M[0], D[0]), spec(M[1], D[0]), init)[3, 0] == w_m
    corner = fills(spec(A[0], M[0]), spec(A[1], M[1]), init)
    assert corner == {(0, 0): Fill.KEPT, (0, 3): no, (4, 0): on, (4, 3): nn}
    assert fills(spec(D[0], A[0]), spec(D[0], A[1]), init)[0, 4] == w_d


def test_the_residual_stream_is_closed_where_it_is_written() -> None:
    for init in ("out_rand", "in_rand"):
        assert fills(spec(D[0], A[0]), spec(D[1], A[0]), init)[2, 0] == Fill.ZERO
        assert fills(spec(M[0], D[0]), spec(M[0], D[1]), init)[0, 2] == Fill.RANDOM
    # The new hidden unit would see the active new units of A: in_rand closes the corner too.
    assert fills(spec(D[0], A[0]), spec(D[1], A[1]), "in_rand")[2, 4] == Fill.ZERO
    assert fills(spec(D[0], A[0]), spec(D[1], A[1]), "out_rand")[2, 4] == Fill.RANDOM


def test_queries_close_the_new_channels_of_old_heads_only() -> None:
    old, new = Axis("heads", 4, group=2), Axis("heads", 9, group=3)
    for init in ("out_rand", "in_rand"):
        queries = fills(spec(old, A[0], Flow.SCORES), spec(new, A[0], Flow.SCORES), init)
        assert queries[2, 0] == queries[5, 0] == Fill.ZERO
        assert queries[6, 0] == Fill.RANDOM
        keys = fills(spec(old, A[0], Flow.GATES), spec(new, A[0], Flow.GATES), init)
        assert keys[2, 0] == keys[6, 0] == Fill.RANDOM


def test_an_inserted_layer_writes_nothing_at_first() -> None:
    reads, writes = spec(M[0], D[0]), spec(D[0], A[0])
    assert inserted_boxes(reads, "in_rand")[0].fill is Fill.RANDOM
    assert inserted_boxes(writes, "in_rand")[0].fill is Fill.ZERO
    assert inserted_boxes(reads, "zero")[0].fill is Fill.ZERO
    assert inserted_boxes(writes, "noise")[0].fill is Fill.NOISE
    assert inserted_boxes(writes, "random")[0].fill is Fill.RANDOM


@pytest.mark.parametrize("init", ["out_rand", "in_rand", "zero", "noise", "random"])
def test_gains_and_the_ends_of_the_model_always_begin_as_in_a_new_model(init: Init) -> None:
    gain = [ParamSpec("g", (axis,), Constant(1.0), Role.VECTOR, (Flow.GATES,)) for axis in D]
    assert fills(*gain, init)[(2,)] == Fill.RANDOM
    head = [spec(axis, D[0], Flow.BOUNDARY) for axis in axes("vocabulary", 7, 8)]
    assert fills(*head, init)[7, 0] == Fill.RANDOM

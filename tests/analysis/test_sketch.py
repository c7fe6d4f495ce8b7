"""Laws of sketches: linear, antipodal bit for bit, unbiased, of the variance, exact at K >= d."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from megatron_nexus.analysis.sketch import Bins, Sketcher, make_bins
from megatron_nexus.analysis.sketch_search import cosines, unit_rows
from megatron_nexus.analysis.sketch_store import SketchRecord, SketchStore, check_record
from megatron_nexus.errors import CheckpointError, DataError
from megatron_nexus.parallel.tensor_parallel import TensorParallel
from megatron_nexus.spec.param import Axis, Flow, Layout, Normal, ParamSpec, Role
from megatron_nexus.spec.shard import Box, Shard

SPEC = ParamSpec(
    "layers.0.w",
    (Axis("rows", 24, Layout.SHARDED_PADDED), Axis("columns", 16)),
    Normal(1.0),
    Role.MATMUL,
    (Flow.WRITES, Flow.READS),
)
ALONE = Shard(0, 1)


def sketch(values: torch.Tensor, bins: Bins, shard: Shard = ALONE, spec: ParamSpec = SPEC) -> torch.Tensor:
    """What a rank adds to the sketch of a tensor whose gradient is `values`, as it lies on the rank."""
    weight = nn.Parameter(torch.zeros(shard.local_shape(spec), dtype=torch.float64))
    sketcher = Sketcher({spec.name: (spec, weight)}, bins, shard, TensorParallel(None), {})
    (weight * values).sum().backward()
    assert weight.grad is None, "it is freed"
    return sketcher.take()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, g = torch.randn(2, *SPEC.shape, generator=generator, dtype=torch.float64)
    return q, 0.4 * q + g


def test_a_sketch_is_linear_and_that_of_minus_q_is_its_negation(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    q, g = pair
    bins = Bins(32, 5)
    mixed = 2.0 * sketch(q, bins) - 3.0 * sketch(g, bins)
    assert torch.allclose(sketch(2.0 * q - 3.0 * g, bins), mixed, rtol=0, atol=1e-12)
    assert torch.equal(sketch(-q, bins), -sketch(q, bins))


def test_products_are_unbiased_with_the_variance_of_the_formula(
    pair: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """2,000 seeds: the error of the mean is 1/45 of a standard deviation, that of the variance 3 %."""
    size, draws = 16, 2000
    q, g = (x.numpy().ravel() for x in pair)
    whole = Box((0, 0), SPEC.shape)
    codes = np.stack([Bins(size, seed).codes(SPEC, whole).ravel() for seed in range(draws)])
    bins, signs = codes % size, 1 - 2 * (codes // size)  # K and more are minus
    rows = np.arange(draws)[:, None] * size + bins

    def sketches(x: np.ndarray) -> np.ndarray:
        return np.bincount(rows.ravel(), (signs * x).ravel(), draws * size).reshape(draws, size)

    own = torch.from_numpy(sketches(q)[7])
    assert torch.allclose(sketch(pair[0], Bins(size, 7)), own, rtol=0, atol=1e-12)
    products = (sketches(q) * sketches(g)).sum(axis=1)
    qq, gg, qg = q @ q, g @ g, q @ g
    expected = (qq * gg + qg**2 - 2.0 * (q**2) @ (g**2)) / size
    assert abs(products.mean() - qg) < 3.5 * np.sqrt(expected / draws)
    assert abs(products.var() / expected - 1.0) < 0.1
    assert np.isclose(products.var(), ((sketches(-q) * sketches(g)).sum(axis=1)).var())


def test_gradients_themselves_have_a_bin_each(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    other = replace(SPEC, name="layers.1.w")
    bins = make_bins({SPEC.name: SPEC, other.name: other}, 0, 1)
    assert bins.size == 2 * SPEC.numel
    q, g = pair
    both = sketch(q, bins) + sketch(g, bins, spec=other)
    assert torch.equal(both, torch.cat([q.flatten(), g.flatten()]))


def test_shards_add_up_and_padding_is_inert(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """5 ranks of 24 rows: of 8 each with padding to 8, the last two hold padding only, here full of ones."""
    q, bins = pair[0], Bins(32, 9)
    total = torch.zeros(32, dtype=torch.float64)
    for rank in range(5):
        shard = Shard(rank, 5, multiple=8)
        local = torch.ones(shard.local_shape(SPEC), dtype=torch.float64)
        box = shard.box(SPEC)
        local[: box.sizes[0]] = q[box.offsets[0] : box.offsets[0] + box.sizes[0]]
        total += sketch(local, bins, shard)
    assert torch.allclose(total, sketch(q, bins), rtol=0, atol=1e-12)


def test_what_all_ranks_hold_is_counted_once(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    spec = replace(SPEC, axes=tuple(replace(axis, layout=Layout.REPLICATED) for axis in SPEC.axes))
    bins = Bins(32, 9)
    parts = [sketch(pair[0], bins, Shard(rank, 2), spec) for rank in range(2)]
    assert torch.equal(sum(parts), sketch(pair[0], bins, spec=spec))


def test_a_scan_gives_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    sketches = torch.randn(150, 40, generator=generator)
    sketches[3] = 0
    queries = torch.nn.functional.normalize(torch.randn(3, 40, generator=generator), dim=1)
    rows = unit_rows(sketches, str).numpy()
    expected = torch.nn.functional.normalize(sketches, dim=1) @ queries.t()
    # Sums of 40 products in float32; half precision keeps 11 bits of each of 40 numbers.
    assert np.abs(cosines(rows, queries) - expected.numpy()).max() < 1e-6
    assert np.abs(cosines(rows.astype(np.float16), queries) - expected.numpy()).max() < 5e-4
    # The mean query gives the mean cosine.
    mean = cosines(rows, queries.mean(dim=0, keepdim=True))
    assert np.abs(mean[:, 0] - cosines(rows, queries).mean(axis=1)).max() < 1e-6
    assert np.array_equal(cosines(rows, -queries), -cosines(rows, queries))
    with pytest.raises(CheckpointError, match="the gradient of 7 is not finite"):
        unit_rows(torch.where(torch.arange(150)[:, None] == 7, torch.inf, sketches), str)


def test_a_folder_of_half_precision_is_read_and_continued(tmp_path: Path) -> None:
    """As they were before records named the type of the numbers."""
    record = SketchRecord("a", "b", 300, 40, 1, "whole", "none", "fp32")
    rows = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float16)
    (tmp_path / "sketches.json").write_text(json.dumps(asdict(record)))
    (tmp_path / "00000000.f16").write_bytes(rows[:256].tobytes())
    for _ in range(2):
        store = SketchStore(tmp_path, record, 40)
        assert (store.dtype, store.missing()) == (np.float16, [256])
        assert np.array_equal(store.read(0), rows[:256])
    store.write(256, rows[256:].astype(np.float32))
    assert (tmp_path / "00000256.f16").read_bytes() == rows[256:].tobytes()
    new = SketchStore(tmp_path / "new", record, 40)
    new.write(0, rows[:256].astype(np.float32))
    assert new.dtype == np.float32 and new.read(0).dtype == np.float32
    path = tmp_path / "new" / "sketches.json"
    path.write_text(path.read_text().replace("float32", "int8"))
    with pytest.raises(DataError, match=r"int8.*give another folder"):
        check_record(tmp_path / "new", record)

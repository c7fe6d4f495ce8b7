"""The order of samples is one, whatever the topology and wherever a run resumes."""

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_nexus.data.blend import Blend
from megatron_nexus.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_nexus.data.loader import micro_batch, sample_numbers
from megatron_nexus.data.samples import TokenWindows, split_documents

SEQ_LENGTH = 4


@pytest.fixture
def windows(tmp_path: Path) -> TokenWindows:
    """50 windows whose first token is 4 times their number."""
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add_document(range(50 * SEQ_LENGTH + 1))
    dataset = IndexedDataset(tmp_path / "corpus")
    return TokenWindows(dataset, split_documents(dataset, "1").train, SEQ_LENGTH, seed=7, vocab_size=201)


def global_batches(windows: TokenWindows, consumed: int, micro: int, dp: int, count: int) -> list[list[int]]:
    """The first tokens of each global batch of 12, sorted, as all ranks together read it."""
    steps = 12 // (micro * dp)
    ranks = [
        map(partial(micro_batch, windows), sample_numbers(consumed, micro, 12, rank, dp))
        for rank in range(dp)
    ]
    return [
        sorted(
            int(first)
            for rank in ranks
            for tokens_BT, _ in islice(rank, steps)
            for first in tokens_BT[:, 0].tolist()
        )
        for _ in range(count)
    ]


def test_labels_are_the_next_tokens(windows: TokenWindows) -> None:
    tokens_BT, labels_BT = micro_batch(windows, range(3))
    assert tokens_BT.shape == labels_BT.shape == (3, SEQ_LENGTH)
    assert tokens_BT.dtype == labels_BT.dtype == torch.int64
    assert tokens_BT.is_contiguous() and labels_BT.is_contiguous()
    assert torch.equal(labels_BT, tokens_BT + 1)


@pytest.mark.parametrize(("micro", "dp"), [(12, 1), (1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (6, 1)])
def test_a_global_batch_is_the_same_on_every_topology(windows: TokenWindows, micro: int, dp: int) -> None:
    expected = [
        sorted(int(windows.sample(k)[0]) for k in range(first, first + 12)) for first in range(0, 120, 12)
    ]
    assert global_batches(windows, 0, micro, dp, 10) == expected


@pytest.mark.parametrize(("micro", "dp"), [(12, 1), (6, 2), (1, 2), (3, 4), (1, 4)])
def test_a_blend_is_one_stream_for_every_topology_and_cursor(
    tmp_path: Path, windows: TokenWindows, micro: int, dp: int
) -> None:
    with IndexedDatasetWriter(tmp_path / "other", np.uint16) as writer:
        writer.add_document(range(1000, 1000 + 7 * SEQ_LENGTH + 1))
    dataset = IndexedDataset(tmp_path / "other")
    part = split_documents(dataset, "1").train
    blend = Blend([windows, TokenWindows(dataset, part, SEQ_LENGTH, seed=8, vocab_size=2000)], (7, 3))
    stream = [
        sorted(int(blend.sample(k)[0]) for k in range(first, first + 12)) for first in range(0, 240, 12)
    ]
    assert any(first >= 1000 for first in stream[0])
    assert global_batches(blend, 0, micro, dp, 20) == stream
    assert global_batches(blend, 132, micro, dp, 9) == stream[11:]


@pytest.mark.parametrize("consumed", [12, 60, 96, 1200])
def test_a_resumed_run_reads_on_where_it_stopped(windows: TokenWindows, consumed: int) -> None:
    uninterrupted = global_batches(windows, 0, 2, 3, consumed // 12 + 3)
    assert global_batches(windows, consumed, 3, 4, 3) == uninterrupted[-3:]


def test_micro_batches_of_one_process_are_in_order(windows: TokenWindows) -> None:
    batches = islice(map(partial(micro_batch, windows), sample_numbers(5, 2, 4, 0, 1)), 30)
    firsts = torch.cat([tokens_BT[:, 0] for tokens_BT, _ in batches]).tolist()
    assert firsts == [int(windows.sample(k)[0]) for k in range(5, 65)]


def test_packed_batches_carry_positions(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", np.uint16) as writer:
        for first in range(0, 60, 3):
            writer.add_document(range(first, first + 3))
    dataset = IndexedDataset(tmp_path / "corpus")
    windows = TokenWindows(dataset, split_documents(dataset, "1").train, SEQ_LENGTH, seed=7, vocab_size=60)
    (tokens_BT, positions_BT), labels_BT = micro_batch(windows, range(5), packed=True)
    assert torch.equal(labels_BT, tokens_BT + 1)
    # Documents are of three tokens; a window's first token counts from 0 in any case.
    since_document, since_window = tokens_BT % 3, torch.arange(SEQ_LENGTH).expand(5, -1)
    assert torch.equal(positions_BT, torch.minimum(since_document, since_window))

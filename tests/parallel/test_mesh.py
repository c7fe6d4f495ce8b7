"""The mesh: what it asks of the system, and how long its ranks wait."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_nexus.errors import ConfigError
from megatron_nexus.parallel.mesh import close_mesh, make_mesh, require_whole_nodes
from megatron_nexus.parallel.world import World
from tests.support.paths import REPOSITORY, TESTS
from tests.support.ports import free_port
from tests.support.ranks import run_ranks
from tests.support.waiting import TIMEOUT_S
from tests.support.warm_server import WarmProcess


@pytest.mark.law
def test_ranks_have_more_connections_than_files_are_open_at_first() -> None:
    """Each group connects its members with each other: 256 ranks pass the limit of 1024.

    The same ranks reduce gradients by node.
    """
    run_ranks(4, TESTS / "parallel" / "mesh_worker.py")


def test_a_stage_that_is_not_whole_nodes_is_not_reduced_by_node() -> None:
    require_whole_nodes(node_size=8, tp_size=2, per_stage=16)
    for node_size, tp_size, per_stage in ((8, 2, 12), (6, 4, 24)):
        with pytest.raises(
            ConfigError, match=rf"the {per_stage} ranks of a .* of {node_size} ranks, .* leave"
        ):
            require_whole_nodes(node_size, tp_size, per_stage)


@pytest.mark.law
def test_ranks_wait_long_for_the_first_step_and_less_in_later_ones() -> None:
    """Outside the model, for a checkpoint or an evaluation, they wait as long as before."""
    run_ranks(2, TESTS / "parallel" / "timeout_worker.py")


@pytest.mark.law
@pytest.mark.parametrize(("flags", "calls"), [("", 3), ("--tp 8 --pp 4", 4)])
def test_what_a_start_costs_rank_0_does_not_grow_with_the_ranks(
    tmp_path: Path, flags: str, calls: int
) -> None:
    """One rank of 16,384, with a fake process group: its calls, groups and connections are counted."""
    out = tmp_path / "counted.json"
    words = ["benchmarks/startup.py", "count", "--ranks", "64", "16384", *flags.split(), "--out", str(out)]
    process = WarmProcess(words, REPOSITORY, os.environ, tmp_path / "output")
    assert process.wait(TIMEOUT_S) == 0, (tmp_path / "output").read_text()
    small, large = json.loads(out.read_text())["rows"]
    assert small["new_group calls"] == large["new_group calls"] == calls
    assert large["groups"] <= 9
    assert large["connections"] <= 120


def test_on_cuda_devices_groups_are_nccl_s_and_a_rank_takes_its_own_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Devices and NCCL are stubbed: there are none here. The host tree and the rest are real."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-3"))
    taken: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    init = dist.init_process_group

    def with_gloo(backend: str, **arguments: Any) -> None:
        taken.append(backend)
        init("gloo", **arguments)

    monkeypatch.setattr(dist, "init_process_group", with_gloo)
    with mock.patch.dict(os.environ):
        mesh = make_mesh(World("srun", 0, 1, 3, 1, "127.0.0.1", free_port()), tp_size=1, pp_size=1)
        assert os.environ["LOCAL_RANK"] == "3"
    close_mesh()
    assert mesh.device == torch.device("cuda", 3)
    assert taken == [mesh.device, "nccl"]

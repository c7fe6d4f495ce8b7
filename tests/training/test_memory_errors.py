"""Memory that runs out: the message says where, and which flags need less; what only CUDA has is refused."""

import pytest
import torch

from megatron_nexus.config.command_line import build, given_flags
from megatron_nexus.config.run_config import RunConfig
from megatron_nexus.errors import ConfigError, TrainingError
from megatron_nexus.parallel.beacon import Beacon, Phase
from megatron_nexus.training.profiler import require_cuda_for_profile, snapshot_path
from megatron_nexus.training.torch_errors import explaining_memory_errors

CPU = torch.device("cpu")


def configure(words: str) -> RunConfig:
    return build(given_flags(words.split()))


def test_a_host_without_memory_is_told_what_needs_less() -> None:
    beacon = Beacon()
    with beacon.in_step(7):
        beacon.mark(Phase.BACKWARD)
        with (
            pytest.raises(TrainingError, match=r"step 7, backward pass: .*allocate") as caught,
            explaining_memory_errors(configure("--micro-batch-size 8"), 3, 4, CPU, beacon),
        ):
            torch.empty(2**50)
    message = str(caught.value)
    assert "out of memory: rank 3 on" in message
    for flag in ("--micro-batch-size 4", "--recompute-granularity selective", "--zero-stage 2", "--tp"):
        assert flag in message
    full = configure("--micro-batch-size 1 --recompute-granularity full --zero-stage 3")
    with pytest.raises(TrainingError) as caught, explaining_memory_errors(full, 0, 1, CPU, beacon):
        raise MemoryError
    assert not [
        flag for flag in ("--micro-batch", "--recompute", "--zero-stage") if flag in str(caught.value)
    ]


def test_other_errors_stay_what_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes"),
        explaining_memory_errors(configure(""), 0, 1, CPU, Beacon()),
    ):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--record-memory-history", "--record-memory-history .* on CPUs: drop it"),
        ("--profile --no-use-pytorch-profiler", "--no-use-pytorch-profiler .* needs CUDA"),
    ],
)
def test_what_only_cuda_has_is_refused_on_cpus(words: str, expected: str) -> None:
    config = configure(words)
    with pytest.raises(ConfigError, match=expected):
        require_cuda_for_profile(config, "cpu")
    require_cuda_for_profile(config, "cuda")
    require_cuda_for_profile(configure("--profile"), "cpu")
    assert str(snapshot_path(config, 2)) == "snapshot_rank_2.pickle"

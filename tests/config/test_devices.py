"""`--device`: what names a device, and what is said of what does not."""

import pytest

from megatron_nexus.config.devices import DEVICES, find_device, parse_device
from megatron_nexus.errors import ConfigError


def test_a_name_with_numbers_over_it_or_numbers_alone() -> None:
    assert parse_device("H100") == DEVICES["h100"]
    smaller = parse_device("h100, memory=40, gpus_per_node=4")
    assert (smaller.memory, smaller.gpus_per_node, smaller.bf16) == (40, 4, DEVICES["h100"].bf16)
    own = parse_device("memory=80,bf16=800,bandwidth=3.35")
    assert (own.memory_bytes, own.peak_flops_per_s("bf16")) == (80 * 2**30, 8e14)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h10", ["h10", "h100 is the nearest", "memory=GiB"]),
        ("", ["--device ''"]),
        ("h100,a100-40g", ["a100-40g"]),
        ("h100,speed=3", ["speed=", "bandwidth"]),
        ("h100,memory=much", ["memory=much", "from 0.001"]),
        ("h100,memory=-1", ["memory=-1", "from 0.001"]),
        ("h100,memory=nan", ["memory=nan", "from 0.001"]),
        ("h100,gemm=1.5", ["gemm=1.5", "to 1"]),
        ("h100,memory=1,memory=2", ["memory twice"]),
        ("h100,gpus_per_node=0.5", ["gpus_per_node=0.5", "from 1 "]),
        ("memory=80,bf16=800", ["lacks bandwidth", "bandwidth=..."]),
        ("h100,speed=3,memory=x", ["speed=", "memory=x"]),
    ],
)
def test_every_problem_of_a_device_is_named(text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_device(text)
    assert all(part in str(caught.value) for part in expected), caught.value


def test_what_torch_calls_a_device_is_found_by_its_most_specific_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA A100-SXM4-80GB": "a100-80g",
        "NVIDIA A100-PCIE-40GB": "a100-40g",
        "NVIDIA H200": "h200",
    }
    assert {name: device.name for name in names if (device := find_device(name))} == names
    assert find_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert find_device("NVIDIA GeForce RTX 4090") is None

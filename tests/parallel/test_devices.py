"""Devices that torch does not see; the error of ranks that share one is in host_tree_worker."""

import pytest

from megatron_nexus.parallel.devices import unseen_devices

TWO = ["/dev/nvidia0", "/dev/nvidia1"]


@pytest.mark.parametrize(
    ("files", "build", "environment", "expected"),
    [
        ([], None, {}, None),
        (TWO, None, {}, "build for CPUs: install"),
        (TWO, "12.8", {}, "built for 12.8 and finds no driver"),
        (TWO, "12.8", {"CUDA_VISIBLE_DEVICES": "0,1"}, "nvidia-smi"),
        (TWO, None, {"CUDA_VISIBLE_DEVICES": ""}, None),  # as the message's remedy says
        (TWO, "12.8", {"CUDA_VISIBLE_DEVICES": "-1"}, None),
        (["/dev/kfd"], "6.4", {"HIP_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_a_machine_whose_devices_torch_does_not_see_is_told_why(
    files: list[str], build: str | None, environment: dict[str, str], expected: str | None
) -> None:
    problem = unseen_devices(files, build, environment)
    if expected is None:
        assert problem == ""
    else:
        assert expected in problem
        assert ", ".join(files) in problem
        assert "CUDA_VISIBLE_DEVICES= (empty)" in problem

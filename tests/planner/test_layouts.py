"""A search's layouts fit, are the fastest that do, and their flags make the run that was predicted."""

import re
import shlex
from dataclasses import replace

import pytest

from megatron_nexus.cli.train_command import read_train_command
from megatron_nexus.config.devices import DEVICES, parse_device
from megatron_nexus.config.rules import check
from megatron_nexus.errors import ConfigError
from megatron_nexus.planner.dry_run import report, search_report
from megatron_nexus.planner.layouts import Layout, Search, layouts
from megatron_nexus.planner.memory import plan_memory
from megatron_nexus.planner.step_time import step_time

H100 = DEVICES["h100"]
BASE = "--preset nexusformer-20m --global-batch-size 64 --dry-run --device h100 --world-size 16"


@pytest.mark.slow
def test_flags_of_a_search_are_those_of_the_run_that_it_predicts() -> None:
    command = read_train_command(shlex.split(f"{BASE} --search"))
    assert command.search and command.device == H100
    found = Search(command.config, H100).fastest(16, 3)
    lines = [line.strip() for line in search_report(command.config, 16, H100, 3)]
    flags = [line for line in lines if line.startswith("--tp")]
    assert len(found) == len(flags) == 3
    for candidate, words in zip(found, flags, strict=True):
        config = read_train_command(shlex.split(f"{BASE} {words}")).config
        check(config, 16)
        assert config == candidate.layout.applied(command.config)
        assert max(memory.peak for memory in plan_memory(config, 16, "cuda")) == candidate.peak_bytes
        assert candidate.peak_bytes <= H100.usable_bytes
        assert step_time(config, 16, H100).total_s == pytest.approx(candidate.time.total_s, rel=0.02)
    assert [one.time.total_s for one in found] == sorted(one.time.total_s for one in found)
    # None that fits is faster.
    for layout in [*layouts(command.config, 16, H100)][::120]:
        assert step_time(layout.applied(command.config), 16, H100).total_s >= found[0].time.total_s * 0.98


@pytest.mark.parametrize(
    ("device", "ranks", "more"),
    [
        ("h100", 1, ""),
        ("h100,memory=30", 1, ""),
        pytest.param("h100,memory=8", 1, "--world-size", marks=pytest.mark.slow),
    ],
)
def test_the_remedy_of_a_plan_that_does_not_fit_fits(device: str, ranks: int, more: str) -> None:
    words = ["--preset", "nexusformer-640m", "--dry-run", "--device", device, "--micro-batch-size", "16"]
    command = read_train_command(words)
    assert command.device is not None
    (warning,) = (line for line in report(command.config, ranks, command.device) if "warning" in line)
    remedy = warning[warning.index("--") :].split(" needs ")[0]
    assert remedy.startswith(more)
    changed = read_train_command([*words, *remedy.split()])
    planned = changed.planned_ranks(1)
    check(changed.config, planned)
    assert max(memory.peak for memory in plan_memory(changed.config, planned, "cuda")) <= (
        command.device.usable_bytes
    )
    assert not any("warning" in line for line in report(changed.config, planned, command.device))


def test_a_plan_that_fits_says_nothing_of_the_machine_that_plans() -> None:
    command = read_train_command(shlex.split(f"{BASE} --micro-batch-size 1 --world-size 256"))
    lines = report(command.config, 256, command.device)
    assert not [line for line in lines if "warning" in line or "machine" in line or "CPU" in line]
    numbers = [line for line in lines if "tokens/s" in line or "MFU" in line]
    assert numbers and all("predicted, not measured" in line for line in numbers)


@pytest.mark.slow
def test_where_no_layout_fits_the_search_says_on_how_many_devices_one_does() -> None:
    config = read_train_command(shlex.split(BASE)).config
    small = parse_device("h100,memory=0.4")
    assert not Search(config, small).fastest(1, 1)
    lines = search_report(config, 1, small)
    assert any("warning" in line and "--world-size" in line for line in lines)
    assert Layout.of(config).changes(Layout.of(config)) == []


def test_devices_for_which_no_layout_divides_are_refused_with_a_batch_for_which_one_does() -> None:
    config = read_train_command(shlex.split(BASE)).config
    with pytest.raises(ConfigError) as caught:
        search_report(config, 127, H100)
    found = re.search(r"--global-batch-size 64 is not a multiple .* use (\d+)", str(caught.value))
    assert found
    other = replace(config, training=replace(config.training, global_batch_size=int(found[1])))
    assert any(layouts(other, 127, H100))

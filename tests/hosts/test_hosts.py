"""Laws of several hosts: losses are those of one; a cut link is named; who is refused keeps none waiting.

Hosts are network namespaces; their frames take 1 ms, and 1 % of them are lost.
"""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from megatron_nexus.errors import EXIT_CODE_RESTART, EXIT_CODE_USER_ERROR
from tests.hosts.network import Host, Network, missing, network
from tests.support.cli import (
    ENDLESS,
    SMALL,
    TORCHRUN,
    Command,
    assert_refused,
    commands,
    ended,
    warm_ranks,
)
from tests.support.paths import TESTS
from tests.support.ports import free_port
from tests.support.subprocesses import WARM_PYTHON, Program, Spawn
from tests.support.waiting import scaled_by_load, wait_for
from tests.support.warm_programs import warm_bin

pytestmark = pytest.mark.slow

DELAY_S, LOSS = 0.001, 0.01
FLAGS = "--tp 2 --fp32 --train-iters 5"
HEARTBEAT_S = 3
ON_HOST = str(TESTS / "hosts" / "on_host.py")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs on one host, in the folder that all hosts share."""
    if why := missing():
        pytest.skip(f"hosts cannot be made here: {why}")
    yield from commands(tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("logs"))


@pytest.fixture
def net(command: Command) -> Iterator[Network]:
    """Four hosts; a test takes as many as it needs."""
    with network(command.folder, 4, DELAY_S, LOSS) as made:
        yield made


def on_hosts(
    spawn: Spawn, folder: Path, hosts: Sequence[Host], launcher: str, words: str, per_host: int = 1
) -> list[Program]:
    """Start the ranks with the variables of a launcher that ends none on another host when one fails."""
    port, size = free_port(), per_host * len(hosts)
    started = []
    for rank in range(size):
        host, local = hosts[rank // per_host], rank % per_host
        names: Mapping[str, str | int] = {
            "srun": {
                "SLURM_PROCID": rank,
                "SLURM_STEP_NUM_TASKS": size,
                "SLURM_LOCALID": local,
                "SLURM_STEP_TASKS_PER_NODE": f"{per_host}(x{len(hosts)})",
            },
            "deepspeed": {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_SIZE": per_host},
        }[launcher]
        variables = [f"{name}={value}" for name, value in names.items()]
        variables += [f"MASTER_ADDR={hosts[0].name}", f"MASTER_PORT={port}"]
        command = [
            WARM_PYTHON,
            ON_HOST,
            str(host.pid),
            *variables,
            "pretrain_nexus.py",
            *SMALL,
            *words.split(),
        ]
        started.append(spawn(command, folder))
    return started


def lost(net: Network) -> int:
    """The frames that were lost so far, of those that went over the network."""
    frames, dropped = net.frames()
    assert frames > 200, "the ranks have talked over this network"
    return dropped


def test_four_hosts_give_the_losses_of_one(spawn: Spawn, command: Command, net: Network) -> None:
    programs = on_hosts(spawn, command.folder, net.hosts, "srun", f"{FLAGS} --save four")
    assert [program.end() for program in programs] == [0] * 4, programs[0].output()
    assert "mesh: tensor 2 x pipeline 1 x data 2" in programs[0].output()
    code, output = command.run(f"{FLAGS} --save one", warm_ranks(4))
    assert code == 0, output
    assert command.losses("four") == command.losses("one")
    assert lost(net) > 0


def test_torchrun_and_mpirun_on_two_hosts_give_the_losses_of_one_and_a_frozen_rank_is_named(
    spawn: Spawn, command: Command, net: Network
) -> None:
    # A file for each rank, as on two hosts.
    code, output = command.run(f"{FLAGS} --save whole --ckpt-files-per-node 2", warm_ranks(2))
    assert code == 0, output
    whole = command.losses("whole")
    first, second = net.hosts[:2]
    words = ["pretrain_nexus.py", *SMALL, *FLAGS.split(), "--save"]
    port = str(free_port())
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", first.name, "--master-port", port]
    programs = []
    for number, host in enumerate((first, second)):
        torchrun = [WARM_PYTHON, ON_HOST, str(host.pid), *TORCHRUN, *nodes, "--node-rank", str(number)]
        rank = ["--no-python", str(warm_bin() / "python"), ON_HOST, str(host.pid), *words, "torchrun"]
        programs.append(spawn([*torchrun, *rank], command.folder))
    assert [ended(program)[0] for program in programs] == [0, 0], programs[0].output()
    assert command.losses("torchrun") == whole
    # The states of random generators, too, are in these files.
    for path in sorted((command.folder / "whole").glob("iter_*/rank_*.safetensors")):
        assert path.read_bytes() == (command.folder / "torchrun" / path.parent.name / path.name).read_bytes()

    frozen = ["--inject", "rank_hung@5,rank=1", "--rank-heartbeat-timeout", str(HEARTBEAT_S)]
    program = mpirun(spawn, command.folder, (first, second), [*words, "mpirun", *frozen])
    code, output = program.end(), program.output()
    assert code == EXIT_CODE_RESTART, output
    # Its daemon on the other host ends when it hears of that, or that mpirun is gone.
    wait_for(lambda: program.left() == {}, "the end of mpirun's daemon and of the frozen rank")
    assert "(--rank-heartbeat-timeout): rank 1 of hostb does not answer: stopped, killed or cut off" in output
    assert re.search(r"^step 5, forward pass: rank 0 waits$", output, re.MULTILINE), output
    assert command.losses("mpirun") == {step: whole[step] for step in range(1, 5)}
    assert lost(net) > 0


def mpirun(spawn: Spawn, folder: Path, hosts: Sequence[Host], words: Sequence[str]) -> Program:
    """Start Open MPI on the first of some hosts, one rank on each; its remote shell enters the others."""
    shell = folder / "remote_shell"
    ways = "".join(f'{host.name}) exec {" ".join(host.enter)} sh -c "$*" ;;\n' for host in hosts)
    shell.write_text(f'#!/bin/sh\nhost=$1; shift\ncase "$host" in\n{ways}esac\n')
    python = folder / "python_on_host"
    ways = "".join(f'{host.name}) exec {warm_bin()}/python {ON_HOST} {host.pid} "$@" ;;\n' for host in hosts)
    python.write_text(f'#!/bin/sh\ncase "$(hostname)" in\n{ways}esac\n')
    for script in (shell, python):
        script.chmod(0o755)
    program = str(Path(sys.executable).with_name("mpirun"))
    flags = ["--allow-run-as-root", "--map-by", "ppr:1:node", "--host", ",".join(h.name for h in hosts)]
    flags += ["--prtemca", "plm_ssh_agent", str(shell), "-n", str(len(hosts))]
    address = ["-x", f"MASTER_ADDR={hosts[0].name}", "-x", f"MASTER_PORT={free_port()}"]
    return spawn([*hosts[0].enter, program, *flags, *address, str(python), *words], folder)


def test_a_cut_link_is_named_on_both_sides(spawn: Spawn, command: Command, net: Network) -> None:
    hosts = net.hosts[:2]
    words = f"{FLAGS} --train-iters {ENDLESS} --save cut --rank-heartbeat-timeout {HEARTBEAT_S}"
    programs = on_hosts(spawn, command.folder, hosts, "srun", words, per_host=2)
    programs[0].wait_for_output("iteration       4/")
    hosts[1].cut()
    began = time.monotonic()
    assert [program.end() for program in programs] == [EXIT_CODE_RESTART] * 4, programs[0].output()
    assert time.monotonic() - began < scaled_by_load(30.0)
    here, there = ("".join(program.output() for program in programs[i : i + 2]) for i in (0, 2))
    place = r"step \d+, [a-z ]+"
    named = r"\(--rank-heartbeat-timeout\): 2 ranks of hostb, from 2 on, do not answer: .* cut off$"
    assert len(re.findall(named, here, re.MULTILINE)) == 1, here
    assert re.search(rf"^{place}: rank [01] waits$", here, re.MULTILINE), here
    named = rf"\(--rank-heartbeat-timeout\): rank 0 of hosta does not answer; rank 2 waits in {place};"
    assert len(re.findall(named, there)) == 1, there


@pytest.mark.parametrize("refused", [0, 1])
def test_a_host_that_is_refused_keeps_none_waiting(
    spawn: Spawn, command: Command, net: Network, refused: int
) -> None:
    hosts = net.hosts[:2]
    folder = command.folder / f"disk_{refused}"  # which the host cannot see
    folder.mkdir()
    for name in ("corpus.bin", "corpus.idx"):
        (folder / name).write_bytes((command.folder / name).read_bytes())
    subprocess.run([*hosts[refused].enter, "mount", "-t", "tmpfs", "none", str(folder)], check=True)
    words = f"{FLAGS} --data-path {folder.name}/corpus --save never"
    programs = on_hosts(spawn, command.folder, hosts, "deepspeed", words)
    codes = [program.end() for program in programs]
    output = programs[refused].output()
    assert codes == [EXIT_CODE_USER_ERROR] * 2, output
    assert_refused(codes[refused], output, "DataError", f"{folder.name}/corpus.idx")
    expected = f"rank {refused} on {hosts[refused].name} was refused: "
    assert_refused(codes[1 - refused], programs[1 - refused].output(), "RefusedError", expected)
    assert not (command.folder / "never").exists()

"""Hosts of a test: Linux network namespaces on one Ethernet that delays frames and loses some.

    hosta: eth0 ---+
    hostb: eth0 ---+--- switch.py: each frame waits, and some are dropped
    ...            |

A host's network, its name and its /etc/hosts are its own; disks, users and process ids are this machine's.
TCP is the kernel's: what is lost is sent again. netem would do the same, where the kernel has it. Needs root.
"""

import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_nexus.parallel.local_ranks import die_with_parent

SWITCH = Path(__file__).with_name("switch.py")
TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_NAMESPACES = ("net", "uts", "mnt")
_SUBNET = "10.77.0"


def missing() -> str:
    """Return why hosts cannot be made here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"{TUN} cannot be opened"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "ip", "link"], capture_output=True, text=True, check=False
    )
    return "" if tried.returncode == 0 else f"unshare: {tried.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """A host: the process whose namespaces are its own, and its address on the network of all."""

    name: str
    address: str
    pid: int

    @property
    def enter(self) -> list[str]:
        """The words before a command that runs it on this host, in the folder of all."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--wd"]

    def cut(self) -> None:
        """Take its link down, as when a cable is pulled: it hears nothing more, and nobody hears it."""
        _run([*self.enter, "ip", "link", "set", "eth0", "down"])


class Network:
    """The hosts, and the switch between them."""

    def __init__(self, hosts: list[Host], switch: "subprocess.Popen[str]") -> None:
        self.hosts = hosts
        self._switch = switch

    def frames(self) -> tuple[int, int]:
        """Return how many frames the switch has seen so far, and how many of them it has dropped."""
        assert self._switch.stdout is not None
        self._switch.send_signal(signal.SIGUSR1)
        seen, dropped = self._switch.stdout.readline().split()
        return int(seen), int(dropped)


@contextmanager
def network(folder: Path, count: int, delay_s: float, loss: float) -> Iterator[Network]:
    """Make `count` hosts whose frames take `delay_s` and are lost with probability `loss`; gone at the end.

    `folder` is one that they share, in which `Host.enter` starts a command.
    """
    names = [f"host{letter}" for letter in "abcdefgh"[:count]]
    addresses = {name: f"{_SUBNET}.{number}" for number, name in enumerate(names, 1)}
    known = folder / "etc_hosts"
    known.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
    holders: list[subprocess.Popen[str]] = []
    taps: list[int] = []
    switch = None
    try:
        hosts = []
        for name, address in addresses.items():
            holders.append(_holder(name, known))
            hosts.append(Host(name, address, holders[-1].pid))
            taps.append(_plug(hosts[-1]))
        switch = subprocess.Popen(
            [sys.executable, "-S", str(SWITCH), str(delay_s), str(loss), *map(str, taps)],
            pass_fds=taps,
            preexec_fn=die_with_parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert switch.stdout is not None and switch.stdout.readline() == "ready\n"
        yield Network(hosts, switch)
    finally:
        for process in [*([switch] if switch else []), *holders]:
            process.kill()
            process.communicate()
        for tap in taps:
            os.close(tap)  # the device goes with it


def _holder(name: str, known: Path) -> "subprocess.Popen[str]":
    """Start the process that a host is: it sleeps, and when it ends the host is gone."""
    script = (
        'mount --make-rprivate / && mount --bind "$1" /etc/hosts && hostname "$2" && ip link set lo up '
        "&& echo ready && exec sleep infinity"
    )
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", script, "sh", str(known), name],
        cwd=known.parent,
        preexec_fn=die_with_parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert holder.stdout is not None
    line = holder.stdout.readline()
    assert line == "ready\n", f"{name}: {line}"
    return holder


def _plug(host: Host) -> int:
    """Give a host its eth0 and return the descriptor of the cable's other end."""
    tap = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    made = fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"nexus%d", _IFF_TAP | _IFF_NO_PI))
    device = made[:16].rstrip(b"\0").decode()
    _run(["ip", "link", "set", device, "netns", str(host.pid)])
    _run([*host.enter, "ip", "link", "set", device, "name", "eth0"])
    _run([*host.enter, "ip", "addr", "add", f"{host.address}/24", "dev", "eth0"])
    _run([*host.enter, "ip", "link", "set", "eth0", "up"])
    return tap


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def enter(pid: int) -> None:
    """Move this process, which has one thread, to the host that a process holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    cwd = Path.cwd()
    for kind in _NAMESPACES:
        with Path(f"/proc/{pid}/ns/{kind}").open() as file:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)
    os.chdir(cwd)

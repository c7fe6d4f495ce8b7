"""A real SLURM of two nodes on this machine, for tests: its own daemons, configuration, state and key.

Both nodes are daemons of this host, under the two names by which it reaches itself. Needs root, as SLURM
starts tasks for users, and Debian's packages; `install` fetches them.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port
from tests.support.waiting import TIMEOUT_S

PACKAGES = ["slurm-wlm", "munge", "libpmix-dev"]
"""The last is what `srun --mpi=pmix` loads."""
PROGRAMS = ["slurmctld", "slurmd", "munged", "sbatch", "srun"]
CPUS = 4
"""What each node claims to have, so that tests that need few do not wait for each other."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
KillWait=25
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=600
UnkillableStepTimeout=660
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing_programs() -> list[str]:
    """What of SLURM is not installed; Debian keeps its daemons outside a user's PATH."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def install() -> str:
    """Install Debian's SLURM; why not, or ""."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(
                ["apt-get", *words], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"apt-get {words[0]}: {error}"
        if done.returncode:
            return f"apt-get {words[0]}: {done.stderr.strip()[-300:]}"
    return ""


@dataclass
class Slurm:
    """A running cluster: commands find it through SLURM_CONF."""

    folder: Path
    nodes: list[str]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its users, without what an outer job may have set."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**kept, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, extra: Mapping[str, str] | None = None) -> str:
        """The output of a SLURM command; fails with what it said."""
        environment = {**self.environment, **(extra or {})}
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, (
            f"{' '.join(command)}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job, by field."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_now(self, number: str) -> None:
        """Do without most of the two minutes that SLURM waits before it starts a requeued job again.

        But of two seconds: a node refuses a start in the second in which it was asked to end the job.
        """
        time.sleep(2)
        command = ["scontrol", "update", f"JobId={number}", "StartTime=now"]
        subprocess.run(command, env=self.environment, capture_output=True, check=False)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{log}:\n{log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start a cluster that keeps everything in `folder`; stopped at the end, jobs and all."""
    host = socket.gethostname().split(".")[0]
    nodes = [host, "localhost"] if host != "localhost" else [host]
    for name in ("state", "munge", *(f"{kind}-{node}" for kind in ("spool", "tmp") for node in nodes)):
        (folder / name).mkdir(parents=True)
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CPUS}"
        for node in nodes
    ]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=host, controller=free_port(), folder=folder, nodes="\n".join(lines))
    )
    cluster = Slurm(folder, nodes)
    munge = folder / "munge"
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o600)
    daemons = [
        ["munged", "--foreground", "--force", f"--log-file={folder}/munge.log"]
        + [f"--{kind}-file={munge}/{kind}" for kind in ("key", "pid", "seed")]
        + [f"--socket={munge}/socket"],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in nodes),
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in daemons:
            running.append(
                subprocess.Popen(
                    command,
                    env=cluster.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        deadline = time.monotonic() + TIMEOUT_S
        while _idle(cluster) < len(nodes):
            assert time.monotonic() < deadline, (
                f"the nodes are not idle after {TIMEOUT_S:.0f} s:\n{cluster.logs()}"
            )
            time.sleep(0.3)
        yield cluster
    finally:
        subprocess.run(["scancel", "--user=root"], env=cluster.environment, capture_output=True, check=False)
        time.sleep(1)
        for daemon in reversed(running):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle(cluster: Slurm) -> int:
    listed = subprocess.run(
        ["sinfo", "--Node", "--noheader", "--format=%T"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return listed.stdout.split().count("idle")

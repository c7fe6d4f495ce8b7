"""Faults of a month: their rates as published, the times that are drawn from them, and the ETTR that remains.

Rates: Llama 3 405B (arXiv 2407.21783, table 5): 419 unexpected interruptions by cause in 54 days on 16,384
GPUs, one in 50,700 GPU hours; loss spikes from PaLM (arXiv 2204.02311): 20 in about 64 days, whatever the
size. Causes become the faults of --inject: a process that dies, one that hangs, a number that is wrong.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

DAY_S = 86_400.0
LLAMA3_DAYS, LLAMA3_GPUS = 54, 16_384
PALM_SPIKES_PER_DAY = 20 / 64
Kind = Literal[
    "rank_killed", "rank_hung", "slow_rank", "nan", "bit_flip", "disk_full", "damaged_checkpoint", "spike"
]
CAUSES: Mapping[str, tuple[int, Kind]] = {
    "faulty GPU": (148, "rank_killed"),
    "GPU HBM3 memory": (72, "rank_killed"),
    "software bug": (54, "rank_killed"),
    "network switch or cable": (35, "rank_hung"),
    "host maintenance": (32, "rank_killed"),
    "GPU SRAM memory": (19, "rank_killed"),
    "GPU system processor": (17, "rank_killed"),
    "NIC": (7, "rank_hung"),
    "NCCL watchdog": (7, "slow_rank"),
    "silent data corruption, of a weight": (3, "bit_flip"),
    "silent data corruption, of a gradient": (3, "nan"),
    "GPU thermal interface or sensor": (6, "slow_rank"),
    "SSD, full or read-only": (2, "disk_full"),
    "SSD, a wrong byte": (1, "damaged_checkpoint"),
    "power supply": (3, "rank_killed"),
    "server chassis": (2, "rank_killed"),
    "IO expansion board": (2, "rank_killed"),
    "dependency": (2, "rank_killed"),
    "CPU": (2, "rank_killed"),
    "system memory": (2, "rank_killed"),
}
"""Interruptions in 54 days on 16,384 GPUs; how those of silent corruption and SSDs divide is a guess."""
GOES_ON: tuple[Kind, ...] = ("nan", "bit_flip", "spike")
"""Faults after which the run goes on by itself, with --spike-policy."""
WAITS: tuple[Kind, ...] = ("rank_hung", "slow_rank")
"""Faults that are noticed after --rank-heartbeat-timeout."""


@dataclass(frozen=True)
class Fault:
    """A fault of the month: when, in seconds of the cluster's training, and what its cause becomes."""

    when_s: float
    cause: str
    kind: Kind
    rank: int


def faults_per_day(gpus: int) -> float:
    """Return how many interruptions a job of so many GPUs has in a day, without spikes."""
    return sum(count for count, _ in CAUSES.values()) / LLAMA3_DAYS * gpus / LLAMA3_GPUS


def draw(gpus: int, days: float, seed: int, ranks: int = 2) -> list[Fault]:
    """Return the faults of some days in order: Poisson processes, causes by their counts."""
    chance = random.Random(seed)
    causes, counts = list(CAUSES), [count for count, _ in CAUSES.values()]
    found = []
    for rate, is_spike in ((faults_per_day(gpus), False), (PALM_SPIKES_PER_DAY, True)):
        when_s = 0.0
        while (when_s := when_s + chance.expovariate(rate / DAY_S)) < days * DAY_S:
            cause = "loss spike" if is_spike else chance.choices(causes, counts)[0]
            kind: Kind = "spike" if is_spike else CAUSES[cause][1]
            found.append(Fault(when_s, cause, kind, chance.randrange(ranks)))
    return sorted(found, key=lambda fault: fault.when_s)


@dataclass(frozen=True)
class Costs:
    """Seconds of a cluster: between saves, of a save, and of a fault besides the steps that it loses."""

    interval_s: float
    save_s: float
    restart_s: float
    """From the end of all ranks to the next step."""
    heartbeat_s: float
    """--rank-heartbeat-timeout."""
    leave_s: float = 5.0
    """From a rank's end, or the time-out, to the end of all ranks."""

    def of(self, kind: Kind) -> float:
        """Return the seconds in which nothing is trained after a fault."""
        if kind in GOES_ON:
            return 0.0
        return self.restart_s + self.leave_s + (self.heartbeat_s if kind in WAITS else 0.0)


def ettr(days: float, faults: Sequence[Fault], costs: Costs) -> float:
    """Return the share of time that trains: what was trained since the last save is lost with each fault."""
    trained_s = days * DAY_S
    idle_s = costs.save_s * math.floor(trained_s / costs.interval_s)
    for fault in faults:
        lost_s = 0.0 if fault.kind in GOES_ON else fault.when_s % costs.interval_s
        if fault.kind == "damaged_checkpoint":
            lost_s += costs.interval_s
        idle_s += lost_s + costs.of(fault.kind)
    return trained_s / (trained_s + idle_s)


def best_interval_s(gpus: int, save_s: float) -> float:
    """Return the interval of saves that loses least: sqrt(2 x save x time between faults), Young 1974."""
    return math.sqrt(2 * save_s * DAY_S / faults_per_day(gpus))


def longest_restart_s(gpus: int, costs: Costs, goal: float) -> float:
    """Return how long a restart may take so that the goal is met on average; negative where none may."""
    between_s = DAY_S / faults_per_day(gpus)
    spare = 1 / goal - 1 - costs.save_s / costs.interval_s
    kinds = [(count, kind) for count, kind in CAUSES.values()]
    waiting = sum(count for count, kind in kinds if kind in WAITS) / sum(count for count, _ in kinds)
    return between_s * spare - costs.interval_s / 2 - costs.leave_s - waiting * costs.heartbeat_s

"""Injected faults: what `--inject FAULT@STEP[,rank=R][,seconds=S]` asks for: a rehearsal, no setting.

`training/fault_injection.py` makes them happen.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_nexus.errors import raise_problems

Kind = Literal["rank_hung", "rank_killed", "slow_rank", "nan", "spike", "bit_flip", "disk_full"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_WORD = re.compile(r"(\w+)@(\d{1,12})(?:,rank=(\d{1,12}))?(?:,seconds=(\d{1,6}(?:\.\d{1,6})?))?")


@dataclass(frozen=True)
class InjectedFault:
    """A fault of one rank at the beginning of an optimizer step, counted from 1 over the whole run."""

    kind: Kind
    step: int
    rank: int
    seconds: float = 0.0
    """Seconds that a slow rank adds to each step from then on; 0: that step is never done."""

    def __str__(self) -> str:
        slower = f",seconds={self.seconds:g}" if self.seconds else ""
        return f"{self.kind}@{self.step},rank={self.rank}{slower}"


def parse_faults(words: Sequence[str]) -> tuple[InjectedFault, ...]:
    """Return the faults of `--inject`; without a rank they are rank 0's.

    Raises ConfigError with every word that is not a fault.
    """
    problems, found = [], []
    for word in words:
        match = _WORD.fullmatch(word)
        kind = next((kind for kind in KINDS if match and match[1] == kind), None)
        seconds = float(match[4] or 0.0) if match else 0.0
        if match is None or kind is None or int(match[2]) < 1 or (seconds and kind != "slow_rank"):
            problems.append(
                f"--inject {word} is not a fault: write such as {KINDS[0]}@12 or {KINDS[1]}@12,rank=1, with "
                f"{', '.join(KINDS)} and a step from 1; slow_rank@12,seconds=0.5 has each step from "
                "then on take so much longer"
            )
        else:
            found.append(InjectedFault(kind, int(match[2]), int(match[3] or 0), seconds))
    raise_problems(problems)
    return tuple(found)


def check_faults(faults: Sequence[InjectedFault], world_size: int, zero_stage: int, last_step: int) -> None:
    """Raise ConfigError for each fault that cannot happen in a run."""
    problems = [
        f"--inject {fault}: the world has {world_size} rank{'s' if world_size > 1 else ''}: give a rank from "
        f"0 to {world_size - 1}"
        for fault in faults
        if fault.rank >= world_size
    ]
    problems += [
        f"--inject {fault}: the run ends at step {last_step}: give a step up to that, or more --train-iters"
        for fault in faults
        if fault.step > last_step
    ]
    problems += [
        f"--inject {fault}: at --zero-stage 3 no rank holds a whole weight: use --zero-stage 0 to 2"
        for fault in faults
        if fault.kind == "bit_flip" and zero_stage == 3
    ]
    raise_problems(problems)

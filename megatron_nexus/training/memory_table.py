"""Memory per rank as a table: a row for all ranks that hold the same."""

from collections.abc import Mapping, Sequence

from megatron_nexus.base.table import table

MIB = 2**20


def rank_groups(
    plan: Sequence[Mapping[str, int]], world_size: int
) -> list[tuple[int, int, Mapping[str, int]]]:
    """First rank, last rank and bytes by column of the ranks of a stage, and of neighbouring stages alike."""
    ranks_per_stage = world_size // len(plan)
    groups: list[tuple[int, int, Mapping[str, int]]] = []
    for stage, memory in enumerate(plan):
        first, last = stage * ranks_per_stage, (stage + 1) * ranks_per_stage - 1
        if groups and groups[-1][2] == memory:
            first = groups.pop()[0]
        groups.append((first, last, memory))
    return groups


def memory_table(plan: Sequence[Mapping[str, int]], world_size: int) -> list[str]:
    """The lines of the table, in MiB; `plan` has the bytes of a rank of each stage by column."""
    rows = [["ranks", *plan[0]]]
    for first, last, memory in rank_groups(plan, world_size):
        ranks = f"{first}-{last}" if last > first else f"{first}"
        rows.append([ranks, *(f"{size / MIB:,.1f}" for size in memory.values())])
    return table(rows, ">")

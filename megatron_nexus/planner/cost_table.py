"""The costs of every preset as a table, a row each, with what the paper prints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_nexus.base.table import table
from megatron_nexus.config.command_line import build
from megatron_nexus.config.paper import PRINTED_SIZES
from megatron_nexus.config.presets import PRESETS, Value
from megatron_nexus.config.rules import check
from megatron_nexus.planner.memory import MIB
from megatron_nexus.planner.model_cost import ModelCost, deviation, model_cost, state_per_rank

# Each column's two lines of heading.
HEADINGS = (
    ("", "model"),
    ("", "parameters"),
    ("paper's", "name"),
    ("", "off"),
    ("without", "vocabulary"),
    ("", "context"),
    ("forward", "MFLOPs"),
    ("of it", "attention"),
    ("forward +", "backward"),
    ("paper's", "MFLOPs"),
    ("", "off"),
    ("MiB", "per rank"),
)


@dataclass(frozen=True)
class CostRow:
    """A model's cost, and the bytes of weights, gradients and optimizer on the rank that holds most."""

    cost: ModelCost
    state_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return all numbers of the row."""
        return {**self.cost.as_json(), "state_bytes_per_rank": self.state_bytes}


def preset_rows(given: Mapping[str, Value], world_size: int | None = None) -> list[CostRow]:
    """Return a row for each preset with `given` flags over it, on `world_size` ranks or one model copy.

    A preset whose sizes differ from those that the paper prints has a second row with the latter.

    Raises ConfigError where the flags do not suit a preset.
    """
    rows = []
    for preset in PRESETS:
        rows.append(_row({**given, "preset": preset}, world_size))
        printed = PRINTED_SIZES.get(preset, {})
        if not printed.items() <= PRESETS[preset].items():
            row = _row({**given, "preset": preset, **printed}, world_size, paper_name=preset)
            rows.append(replace(row, cost=replace(row.cost, name=f"{preset} as printed")))
    return rows


def _row(flags: Mapping[str, Value], world_size: int | None, paper_name: str = "") -> CostRow:
    config = build(flags)
    ranks = world_size or config.model_parallel_size
    check(config, ranks)
    most = max(memory["together"] for memory in state_per_rank(config, ranks))
    return CostRow(model_cost(config, paper_name), most)


def cost_table(rows: Sequence[CostRow]) -> list[str]:
    """Return the lines of the table; FLOPs are in millions per token."""
    return table([*zip(*HEADINGS, strict=True), *(_cells(row) for row in rows)])


def _cells(row: CostRow) -> tuple[str, ...]:
    cost = row.cost
    return (
        cost.name,
        f"{cost.parameters:,}",
        cost.paper_size or "-",
        _percent(deviation(cost.parameters, cost.paper_parameters)),
        f"{cost.non_embedding:,}",
        f"{cost.seq_length:,}",
        _millions(cost.forward_flops),
        _millions(cost.attention_flops),
        _millions(cost.training_flops),
        _millions(cost.paper_flops),
        _percent(deviation(cost.forward_flops, cost.paper_flops)),
        f"{row.state_bytes / MIB:,.0f}",
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f} %"


def _millions(flops: int | None) -> str:
    return "-" if flops is None else f"{flops / 1e6:,.1f}"

"""The verb `presets`: the named models with their true sizes.

    nexus presets
    nexus presets --json

Parameters are counted from the descriptions of the tensors; no tensor is made.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext

from megatron_nexus import log
from megatron_nexus.base.imports import gc_paused
from megatron_nexus.base.invocation import command
from megatron_nexus.base.table import table
from megatron_nexus.config.command_line import build
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.config.presets import DEFAULT_PRESET, PRESETS

FAMILIES = {
    "nexusformer": "Nexusformer: Q, K and V are nonlinear maps whose widths M and A grow",
    "nexusformer-released": "Nexusformer as in its authors' code: output projection and FFN alike",
    "tokenformer": "Tokenformer, a baseline: every projection attends to slots, whose number grows",
    "qwen3": "Qwen3, a baseline: linear projections, grouped queries, QK norm",
    "transformer++": "Transformer++, a baseline: Llama's block",
}
GROWING = ("nexusformer", "tokenformer")
GROWN = ("300m", "380m", "440m")
PURPOSES = {"tiny": "minutes on two CPU cores", "20m": "experiments on a CPU"}


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags."""
    parser = FlagParser("presets", "[flags]", description="List the named models with their true sizes.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus presets` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    with nullcontext() if given.json else log.importing("torch"):
        rows = list(preset_rows())
    if given.json:
        log.logger.info("%s", json.dumps(rows, indent=1))
        return
    log.show(_table(rows))


def preset_rows() -> Iterator[dict[str, int | str]]:
    """Yield the sizes of each preset, its family and what it is for."""
    with gc_paused():
        from megatron_nexus.models.decoder import decoder_specs
        from megatron_nexus.spec.cost import parameter_count

    for name in PRESETS:
        family, _, size = name.rpartition("-")
        model = build({"preset": name}).model
        default = "the default: " if name == DEFAULT_PRESET else ""
        yield {
            "preset": name,
            "parameters": parameter_count(decoder_specs(model).values()),
            "layers": model.num_layers,
            "hidden": model.hidden_size,
            "heads": model.num_attention_heads,
            "M": model.nexus_m,
            "A": model.nexus_a,
            "slots": model.pattention_slots,
            "FFN": model.ffn_hidden_size,
            "vocabulary": model.vocab_size,
            "family": family,
            "for": default + _purpose(family, size),
        }


def _purpose(family: str, size: str) -> str:
    if family in GROWING and size in GROWN:
        return "grown from 240m"
    return PURPOSES.get(
        size,
        f"the paper's {size.upper()}" if family != "nexusformer-released" else "compare nexusformer-240m",
    )


def _table(rows: list[dict[str, int | str]]) -> Iterator[str]:
    for family, summary in FAMILIES.items():
        members = [row for row in rows if row["family"] == family]
        columns = [name for name in rows[0] if name != "family" and any(row[name] for row in members)]
        cells = [columns, *([_cell(row[name]) for name in columns] for row in members)]
        yield summary
        yield from (f"  {line}" for line in table(cells, "<" + ">" * (len(columns) - 2) + "<"))
        yield ""
    yield f"Sizes are counted; those in the paper's names differ: {command('count')} --all"


def _cell(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"

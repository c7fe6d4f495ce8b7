"""The verb `upcycle`: add Nexus-Ranks, or attention of a higher order, to a trained model.

    nexus upcycle --load runs/llama --save runs/upcycled --verify
    nexus upcycle --load runs/llama --save runs/order2 --attention-order 2 --verify

Q = X W becomes X W + gelu(gelu(X W_M) W_A) W_D, and K and V alike. The new branch is a Nexus-Rank that grows
from M = A = 0: by the law of growth one factor of each of its paths is zero, so the model computes what it
did and a gradient reaches every new weight. From then on the branch grows as any other.

With --attention-order, a model of any projections gets inner attentions behind gates of zero (see
`models.higher_order`), and Nexus-Ranks too only where a width of them is given.
"""

import argparse
from dataclasses import replace

from megatron_nexus.checkpoint.location import location
from megatron_nexus.checkpoint.saved_run import open_saved_run
from megatron_nexus.cli.grow import add_writing_flags, write_grown
from megatron_nexus.config.config_field import flag_of
from megatron_nexus.config.flag_parser import FlagParser
from megatron_nexus.growth.request import add_settings_flags, with_empty_branch

WIDENING = {"nexus_m": 5 / 4, "nexus_a": 3 / 2}
"""M and A in hidden sizes where no flag says otherwise: D < M < A, as in the small presets."""


def make_parser() -> FlagParser:
    """Return the parser of the verb's flags; one that is not given leaves no attribute behind."""
    parser = FlagParser(
        "upcycle",
        "--load RUN --save FOLDER [flags]",
        description=(
            "Give the linear Q, K and V projections of a trained model additional Nexus-Ranks, or its "
            "attention a higher order, or both, without changing its function. The source is never touched."
        ),
        argument_default=argparse.SUPPRESS,
    )
    add_writing_flags(parser)
    for name, share in WIDENING.items():
        text = f"width of the branch (default: {share:g} of the hidden size)"
        parser.add_flag(flag_of(name), text, type=int)
    text = "order of the attention, behind gates that begin at 0; adds no branch unless a width is given"
    parser.add_flag("--attention-order", text, type=int)
    add_settings_flags(parser)
    return parser


def run(argv: list[str]) -> None:
    """Run `nexus upcycle` with the flags `argv`."""
    given = make_parser().parse_args(argv)
    saved, values = open_saved_run(location(given.load)), vars(given)
    sizes = {"attention_order": given.attention_order} if "attention_order" in values else {}
    if not sizes or WIDENING.keys() & values.keys():
        saved = replace(saved, config=with_empty_branch(saved.config))
        sizes |= {
            name: values.get(name, round(share * saved.config.model.hidden_size))
            for name, share in WIDENING.items()
        }
    write_grown(given, saved, sizes)

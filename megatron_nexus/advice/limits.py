"""What published work says of a growth's size and time: each limit with its source."""

from dataclasses import dataclass
from math import log10

from megatron_nexus.advice.curve import Size

FACTOR, SLACK = 2.0, 0.1
TOKENS_PER_PARAMETER = 20.0
G_STACK_PARAMETERS = (4e8, 1e11)
"""Range of targets for which its authors fitted or used the formula; others are left out."""


@dataclass(frozen=True)
class Limit:
    """A limit of the literature and where this growth stands."""

    name: str
    source: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{self.name} ({self.source}): {self.text}"


def stack_tokens(parameters: float, flops: float) -> float:
    """Return the tokens after which G_stack grows the small model (2405.15319, its equation for d)."""
    return float(10.0 ** (0.88 * log10(parameters) + 163.27 / log10(flops) - 5.74))


def limits(small: Size, target: Size, base_tokens: float, end_tokens: float, flops: float) -> list[Limit]:
    """Compare a growth at `base_tokens`, which ends at `end_tokens` and `flops`, with the literature."""
    factor = target.parameters / small.parameters
    of_base, of_target = base_tokens / small.parameters, end_tokens / target.parameters
    found = [
        Limit("factor", "2605.13405", factor > FACTOR + SLACK, f"{factor:.2f} x the parameters, 2 held best"),
        Limit(
            "tokens a parameter",
            "2605.13405",
            of_target > TOKENS_PER_PARAMETER,
            f"{of_target:.1f} of the target at the end, gains were largest below 20",
        ),
        Limit(
            "saturation",
            "2510.06548",
            of_base > TOKENS_PER_PARAMETER,
            f"{of_base:.1f} tokens a parameter of the base; the more it has, the less a growth adds",
        ),
    ]
    least, most = G_STACK_PARAMETERS
    if least <= target.parameters <= most:
        tokens = stack_tokens(target.parameters, flops)
        text = f"stacking after {tokens:.2e} tokens, the base has {base_tokens:.2e}"
        found.append(Limit("timing", "2405.15319", base_tokens > 2.0 * tokens, text))
    return found

"""Text tables: columns aligned to the left or to the right."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str = "<>") -> list[str]:
    """Return the lines of a table.

    `align` has a "<" or ">" for each column; its last one stands for all columns after it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]

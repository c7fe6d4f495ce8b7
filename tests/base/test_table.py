"""Tables: columns are aligned, and no line ends in blanks."""

from megatron_nexus.base.table import table


def test_columns_are_aligned_as_asked_and_the_last_letter_stands_for_the_rest() -> None:
    rows = [["name", "a", "long"], ["x", "1,000", ""]]
    assert table(rows) == ["name      a  long", "x     1,000"]
    assert table(rows, "<") == ["name  a      long", "x     1,000"]
    assert table(rows, ">") == ["name      a  long", "   x  1,000"]

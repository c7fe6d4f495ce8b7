"""Duration: a time in words."""


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it, such as "45 s", "12 min", "3.2 h" or "2.4 d"."""
    for unit, length, limit in (("s", 1.0, 120.0), ("min", 60.0, 7200.0), ("h", 3600.0, 172800.0)):
        if seconds < limit:
            count = seconds / length
            return f"{count:.1f} {unit}" if count < 10 and unit != "min" else f"{count:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"

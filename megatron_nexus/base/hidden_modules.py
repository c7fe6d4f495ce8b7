"""Hide modules from a library that imports what is installed, for something that is not used here."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden_modules(*names: str) -> Iterator[None]:
    """Have imports of the modules `names` fail inside, as if they were not installed.

    DeepSpeed's autotuner, which no run uses, imports MLflow: a quarter of the start of every rank. A module
    that has been imported before is not hidden.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # has its import fail
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]

"""Code that runs compiled blocks as they are without compilation."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Have compiled blocks run eagerly inside a function: it reads values, or texts of many lengths.

    `torch.compiler.set_stance`, as a decorator, would import torch's compiler with this package: two seconds.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return call

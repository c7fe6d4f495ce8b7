"""Optional packages by extra, and the command that installs them wherever this package came from.

The project is on no index: `pip install -e .[eval]` works in a checkout only, its packages anywhere.
"""

import shlex

EXTRAS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard>=2.18",),
    "wandb": ("wandb>=0.19",),
    "mlflow": ("mlflow>=3",),
    "s3": ("s3fs>=2025.1",),
    "analysis": ("scipy>=1.13",),
    "eval": ("lm-eval>=0.4.13,<0.5", "datasets>=4"),
}
"""As in pyproject.toml."""


def install_command(extra: str) -> str:
    """Return the pip command that installs the packages of an extra."""
    return shlex.join(["pip", "install", *EXTRAS[extra]])

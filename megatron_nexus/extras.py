"""Optional packages by extra, and the command that installs them wherever this package came from.

The project is on no index: `pip install -e .[eval]` works in a checkout only, its packages anywhere.
"""

import importlib.util
import re
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


def missing_packages(extra: str, needed_by: str) -> list[str]:
    """Return what is wrong where packages of an extra, which something needs, are not installed."""
    names = [re.split("[<>=]", package)[0] for package in EXTRAS[extra]]
    missing = [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]
    wanted = f"{needed_by} {' and '.join(missing)}, not installed here: {install_command(extra)}"
    return [wanted] if missing else []

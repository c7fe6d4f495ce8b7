"""The one system that this package runs on."""

import sys

from megatron_nexus.errors import ConfigError


def require_linux() -> None:
    """Raise ConfigError on another system: locks, signals and /proc are Linux' own here."""
    if sys.platform != "linux":
        raise ConfigError(
            f"megatron_nexus runs on Linux, and this is {sys.platform}: use a Linux machine, WSL 2 on "
            "Windows, or the container of the Dockerfile"
        )

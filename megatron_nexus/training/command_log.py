"""The commands that trained a run, a line each in its folder: what `nexus report` repeats."""

import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

COMMANDS_FILE = "commands.jsonl"


def log_command(run_dir: Path, words: Sequence[str], step: int) -> None:
    """Append the command that trains on from a step."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with (run_dir / COMMANDS_FILE).open("a") as file:
        file.write(json.dumps({"step": step, "time": now, "command": shlex.join(words)}) + "\n")

"""The folder of a run's checkpoints: their names, which one is the latest, how a new one gets in place.

SAVE/iter_0000100/  a checkpoint; on a disk it gets this name only when it is complete
SAVE/latest         the name of the one to resume from, replaced atomically
"""

import re
from contextlib import suppress

from megatron_nexus.checkpoint.location import Location, Place
from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megatron_nexus.checkpoint.run_lock import unwritable
from megatron_nexus.checkpoint.storage import LATEST_FILE, LocalFolder, folder_of
from megatron_nexus.checkpoint.store import rank_files
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import logger

TOKENIZER_FOLDER = "tokenizer"
"""In the folder of a run that was imported with its tokenizer."""

_NAME = re.compile(r"iter_(\d+)")


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"iter_{step:07d}"


def temporary_folder(root: Place, step: int) -> Place:
    """Where a step's checkpoint is written before it is one."""
    return root / folder_of(root / checkpoint_name(step)).unfinished_name


def begin_checkpoint(root: Location, step: int) -> None:
    """Clear away what dead saves left, and make room for a new checkpoint. Raises OSError."""
    folder_of(root / checkpoint_name(step)).begin()


def publish_checkpoint(root: Location, step: int) -> None:
    """Give a checkpoint that has all its files its name, and make it the latest. Raises OSError."""
    folder_of(root / checkpoint_name(step)).publish()


def abandon_checkpoint(root: Location, step: int) -> None:
    """Delete what a save that failed has written, as far as that is possible."""
    folder_of(root / checkpoint_name(step)).abandon()


def _missing(folder: Location) -> list[str]:
    """The files that a checkpoint lacks: its manifest, or files of ranks. Not whether they are undamaged."""
    held = folder_of(folder).sizes()
    if MANIFEST_FILE not in held:
        return [MANIFEST_FILE]
    ranks = range(read_manifest(folder).topology.world_size)
    return [file.name for rank in ranks for file in rank_files(folder, rank) if file.name not in held]


def _checkpoints(root: Location) -> dict[int, Location]:
    """All folders of checkpoints in a run's folder, complete or not, by step."""
    found: dict[int, Location] = {}
    if not root.is_dir():
        return found
    entries = {folder.name: folder for folder in root.iterdir()}
    for prefix in (LocalFolder.replaced, ""):
        for name, folder in entries.items():
            match = _NAME.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if match and folder.is_dir():
                found[int(match[1])] = folder
    return dict(sorted(found.items()))


def latest_step(root: Location) -> int | None:
    """The step of the checkpoint that `latest` names, whether that is there or not; None if it names none."""
    latest = root / LATEST_FILE
    named = _NAME.fullmatch(latest.read_text(errors="replace").strip()) if latest.is_file() else None
    return int(named[1]) if named else None


def complete_checkpoints(root: Location) -> dict[int, Location]:
    """The folders of the checkpoints that have all their files and a sound manifest, by step."""
    found = {}
    for step, folder in _checkpoints(root).items():
        with suppress(CheckpointError):
            if not _missing(folder):
                found[step] = folder
    return found


def newest_checkpoint(root: Location) -> Location | None:
    """The checkpoint that `latest` names; if there is none such, the complete one of the highest step.

    None where the folder has no complete checkpoint, or does not exist.

    Raises:
        CheckpointError: a manifest is damaged or of a newer format.
    """
    checkpoints = _checkpoints(root)
    step = latest_step(root)
    chosen = checkpoints.get(step) if step is not None else None
    if chosen is not None and not _missing(chosen):
        return chosen
    newest = next((folder for folder in reversed(checkpoints.values()) if not _missing(folder)), None)
    if newest is not None:
        logger.info("%s names no complete checkpoint: taking %s, the newest", root / LATEST_FILE, newest.name)
    return newest


def find_checkpoint(path: Location) -> Location:
    """The folder of the checkpoint that a user means by `path`: a run's folder or a checkpoint in it.

    Raises:
        CheckpointError: there is none; the message lists what is there.
    """
    if _NAME.fullmatch(path.resolve().name) or (path / MANIFEST_FILE).exists():
        if (path / MANIFEST_FILE).is_file():
            return path
        problem = f"incomplete, without {MANIFEST_FILE}" if path.is_dir() else "no such checkpoint"
        raise CheckpointError(f"{path}: {problem}; {_listing(path.parent)}: give another to load")
    found = newest_checkpoint(path)
    if found is None:
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is a file: give a run's folder, or one checkpoint in it")
        problem = "no complete checkpoint" if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: {problem}; {_listing(path)}: give another to load")
    return found


def _listing(folder: Location) -> str:
    """What is in a folder, or in the nearest one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    checkpoints = [
        path.name + (f" (without {', '.join(missing)})" if (missing := _missing(path)) else "")
        for path in _checkpoints(folder).values()
    ]
    if checkpoints:
        return f"{folder} has the checkpoints {', '.join(checkpoints)}"
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"{folder} holds {shown or 'nothing'}"


def require_own_folder(folder: Location, checkpoint: Location | None) -> None:
    """Raise ConfigError where a run from `checkpoint` cannot save in `folder`.

    It is a file, or holds checkpoints that the run does not continue: none is ever overwritten. Only looks.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"--save {folder} is a file: give a folder, or a name that does not exist yet"])
    newest = newest_checkpoint(folder)
    if newest is not None and (checkpoint is None or checkpoint.resolve() != newest.resolve()):
        raise ConfigError(
            [
                f"--save {folder} holds {newest.name}, which this run does not continue and might "
                f"overwrite: use --load {folder} to continue it, or another --save"
            ]
        )


def claim_run_folder(folder: Location, checkpoint: Location | None) -> None:
    """Find out whether a run that starts from `checkpoint` can save in `folder`, which exists on a disk.

    Raises:
        ConfigError: as `require_own_folder`.
        CheckpointError: it cannot be written.
    """
    require_own_folder(folder, checkpoint)
    trial = folder / ".writable"
    try:
        trial.write_text(" " * 4096)
        trial.unlink()
    except OSError as error:
        with suppress(OSError):
            trial.unlink()
        raise unwritable(folder, error) from error

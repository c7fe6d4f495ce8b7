"""The folder of a run's checkpoints: their names, the latest, those that are kept, and the lock of the run.

SAVE/iter_0000100/  a checkpoint; on a disk it gets this name only when it is complete
SAVE/latest         the name of the one to resume from, replaced atomically
SAVE/.lock          of the run that saves here: two would mix; a run that is refused leaves no folder
"""

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from megatron_nexus.base.durable import LOCK_FILE, dir_lock
from megatron_nexus.checkpoint.checksummed_json import is_truncated
from megatron_nexus.checkpoint.format_2 import rank_defect
from megatron_nexus.checkpoint.location import Location
from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, is_of_another_format, parse_manifest
from megatron_nexus.checkpoint.storage import LATEST_FILE, LocalFolder, folder_of
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import logger

TOKENIZER_FOLDER = "tokenizer"
"""In the folder of a run that was imported with its tokenizer."""

_NAME = re.compile(r"iter_(\d+)")


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"iter_{step:07d}"


def _defects(folder: Location) -> list[str]:
    """List what files, or ends of files, a checkpoint lacks. Raises CheckpointError: of another format."""
    try:
        held = folder_of(folder).sizes()
        if MANIFEST_FILE not in held:
            return [f"without {MANIFEST_FILE}"]
        contents = (folder / MANIFEST_FILE).read_bytes()
        if is_truncated(contents) and not is_of_another_format(contents):
            return [f"{MANIFEST_FILE} is cut short"]
        try:
            manifest = parse_manifest(contents, folder / MANIFEST_FILE)
        except CheckpointError as error:
            if is_of_another_format(contents):
                raise
            return [f"{MANIFEST_FILE} is damaged: {error.__cause__}"]
        if not manifest.files:
            ranks = range(manifest.topology.world_size)
            return [defect for rank in ranks if (defect := rank_defect(folder, rank, held))]
        return [
            f"{name} has {held[name]:,} of {size:,} bytes" if name in held else f"without {name}"
            for name, size in manifest.files.items()
            if held.get(name) != size
        ]
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]


def _checkpoints(root: Location) -> dict[int, Location]:
    """Return all checkpoint folders in a run's folder, complete or not, by step."""
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
    """Return the step of the checkpoint that `latest` names, even if it is gone; None if there is none."""
    latest = root / LATEST_FILE
    named = _NAME.fullmatch(latest.read_text(errors="replace").strip()) if latest.is_file() else None
    return int(named[1]) if named else None


def complete_checkpoints(root: Location) -> dict[int, Location]:
    """Return the folders of the complete checkpoints, by step."""
    found = {}
    for step, folder in _checkpoints(root).items():
        with suppress(CheckpointError):
            if not _defects(folder):
                found[step] = folder
    return found


def checkpoint_before(checkpoint: Location) -> Location | None:
    """Return the newest complete checkpoint of the same run from an earlier step."""
    steps = complete_checkpoints(checkpoint.parent)
    own = next((step for step, folder in steps.items() if folder == checkpoint), None)
    earlier = [step for step in steps if own is not None and step < own]
    return steps[max(earlier)] if earlier else None


def newest_checkpoint(root: Location) -> Location | None:
    """Return the checkpoint that `latest` names or, if that is incomplete, the newest complete one.

    None where the folder has no checkpoint, or does not exist.

    Raises CheckpointError: a manifest is of another format, or no checkpoint here is whole.
    """
    checkpoints = _checkpoints(root)
    step = latest_step(root)
    chosen = checkpoints.get(step) if step is not None else None
    defects = _defects(chosen) if chosen is not None else []
    if chosen is not None and not defects:
        return chosen
    newest = next((folder for folder in reversed(checkpoints.values()) if not _defects(folder)), None)
    if newest is None:
        # In an object store a save that died leaves files without a manifest; on a disk it has another name.
        damaged = [
            folder
            for folder in checkpoints.values()
            if isinstance(folder, Path) or (folder / MANIFEST_FILE).is_file()
        ]
        if damaged:
            raise CheckpointError(
                f"{root}: no checkpoint in it is whole: {_listing(root)}: copy one again, or give another "
                "folder"
            )
    elif chosen is None:
        _tell_once(f"{root / LATEST_FILE} names no checkpoint: taking {newest.name}, the newest")
    else:
        _tell_once(
            f"warning: {chosen} is damaged ({'; '.join(defects)}): going back to {newest.name}, the newest "
            "whole checkpoint"
        )
    return newest


@cache
def _tell_once(message: str) -> None:
    logger.info("%s", message)


def find_checkpoint(path: Location) -> Location:
    """Return the checkpoint folder for `path`, which is a run's folder or a checkpoint in it.

    Raises CheckpointError: there is none; the message lists what is there.
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
    """Describe what is in a folder, or in the nearest one above it that exists."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    checkpoints = [
        path.name + (f" ({'; '.join(defects)})" if (defects := _defects(path)) else "")
        for path in _checkpoints(folder).values()
    ]
    if checkpoints:
        return f"{folder} has the checkpoints {', '.join(checkpoints)}"
    entries: list[Location] = list(folder.iterdir())
    # A run is a folder: files are listed only where there are no folders.
    folders = [f"{path.name}/" for path in entries if path.is_dir() and not path.name.startswith(".")]
    names = sorted(folders or (path.name for path in entries))
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"{folder} holds {shown or 'nothing'}"


def check_save_folder(folder: Location, checkpoint: Location | None) -> None:
    """Raise ConfigError if a run from `checkpoint` must not save in `folder`.

    It is a file, or holds checkpoints that the run does not continue: none is ever overwritten. Raises
    CheckpointError where it cannot be made or written, as far as permissions tell. Only looks.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--save {folder} is a file: give a folder, or a name that does not exist yet")
    if (folder / MANIFEST_FILE).is_file():
        raise ConfigError(f"--save {folder} is a checkpoint, which is never changed: give another folder")
    if isinstance(folder, Path):
        above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not above.is_dir():
            raise ConfigError(f"--save {folder} lies below {above}, a file: give a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise not_writable_error(folder, OSError(errno.EACCES, f"{above} cannot be written"))
    newest = newest_checkpoint(folder)
    if newest is not None and (checkpoint is None or checkpoint.resolve() != newest.resolve()):
        raise ConfigError(
            f"--save {folder} holds {newest.name}, which this run does not continue and might "
            f"overwrite: use --load {folder} to continue it, or another --save"
        )


def check_writable(folder: Location, checkpoint: Location | None) -> None:
    """Check that a run that starts from `checkpoint` can save in `folder`, which exists on a disk.

    Raises ConfigError as `check_save_folder`; CheckpointError: it cannot be written.
    """
    check_save_folder(folder, checkpoint)
    trial = folder / ".writable"
    try:
        trial.write_text(" " * 4096)
        trial.unlink()
    except OSError as error:
        with suppress(OSError):
            trial.unlink()
        raise not_writable_error(folder, error) from error


@contextmanager
def run_dir_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; creates the folder if it is missing.

    Afterwards the lock is gone, and so are those of the folders made here in which nothing was written.

    Raises ConfigError: another run holds the lock, which on NFS may reach this machine only; CheckpointError:
    the folder cannot be made or written.
    """
    with ExitStack() as held:
        try:
            lock = held.enter_context(dir_lock(folder))
        except BlockingIOError as error:
            user = ""
            with suppress(OSError):
                user = (folder / LOCK_FILE).read_text(errors="replace").strip()
            raise ConfigError(
                f"--save {folder} is in use by {user or 'another run'}: wait for it, or give another --save"
            ) from error
        except OSError as error:
            raise not_writable_error(folder, error) from error
        with suppress(OSError):  # on a full disk it says nothing
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def not_writable_error(folder: object, error: OSError) -> CheckpointError:
    """Return the error for a save folder that cannot be written, with its remedy."""
    return CheckpointError(
        f"--save {folder}: {error.strerror}: give a folder that can be written, on a disk that all ranks "
        "share"
    )


def delete_outdated(root: Location, keep_latest: int, keep_every: int = 0) -> None:
    """Delete the checkpoints in a run's folder that are not to be kept.

    The newest `keep_latest` are kept, all where it is 0, and the multiples of `keep_every`, if it is not 0.
    Only complete ones are deleted that `latest` names a newer one than, that nobody reads, and that lie in
    this folder themselves (links and their targets are left alone). A checkpoint that cannot be deleted is
    reported and tried again next time.
    """
    latest = latest_step(root)
    if latest is None or not keep_latest:
        return
    try:
        folder_of(root).clear_deleted()
        until_latest = [item for item in complete_checkpoints(root).items() if item[0] <= latest]
        for step, folder in until_latest[:-keep_latest]:
            is_kept = keep_every and step % keep_every == 0
            if is_kept or folder.is_symlink() or folder.name != checkpoint_name(step):
                continue
            if not folder_of(folder).delete():
                logger.info("%s is being read: it will be deleted later", folder)
    except (OSError, CheckpointError) as error:
        logger.warning("old checkpoints are left: %s", error)

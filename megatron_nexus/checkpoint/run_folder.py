"""The folder of a run's checkpoints: their names, which one is the latest, how a new one gets in place.

SAVE/iter_0000100/       a checkpoint; it gets this name only when it is complete
SAVE/latest              the name of the one to resume from, replaced atomically
SAVE/.tmp_iter_0000200/  a save under way, or one that died
SAVE/.old_iter_0000100/  a checkpoint while another one of the same step takes its place
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from megatron_nexus.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megatron_nexus.checkpoint.store import rank_files, sync_folder, write_durably
from megatron_nexus.errors import CheckpointError, ConfigError
from megatron_nexus.log import logger

LATEST_FILE = "latest"
_NAME = re.compile(r"iter_(\d+)")
_TEMPORARY = ".tmp_"
_REPLACED = ".old_"


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"iter_{step:07d}"


def temporary_folder(root: Path, step: int) -> Path:
    """Where a step's checkpoint is written before it gets its name."""
    return root / f"{_TEMPORARY}{checkpoint_name(step)}"


def begin_checkpoint(root: Path, step: int) -> None:
    """Clear away what dead saves left, and make the temporary folder of a new one. Raises OSError."""
    root.mkdir(parents=True, exist_ok=True)
    for folder in root.glob(f"{_REPLACED}iter_*"):
        place = root / folder.name.removeprefix(_REPLACED)
        if place.exists():
            shutil.rmtree(folder)
        else:  # the save died between its two renames
            folder.rename(place)
    for folder in root.glob(f"{_TEMPORARY}iter_*"):
        shutil.rmtree(folder)
    temporary_folder(root, step).mkdir()


def publish_checkpoint(root: Path, step: int) -> None:
    """Give a complete temporary folder its final name, and make it the latest. Raises OSError.

    A checkpoint of the same step is replaced: it may be of another run in the same folder. It is set
    aside first and deleted last, and `find_checkpoint` finds it there should this process die in between.
    """
    temporary, name = temporary_folder(root, step), checkpoint_name(step)
    place, aside = root / name, root / f"{_REPLACED}{name}"
    sync_folder(temporary)
    if place.exists():
        place.rename(aside)
    temporary.rename(place)
    sync_folder(root)
    latest = root / f"{_TEMPORARY}{LATEST_FILE}"
    write_durably(latest, f"{name}\n")
    latest.replace(root / LATEST_FILE)
    sync_folder(root)
    if aside.exists():
        shutil.rmtree(aside)


def abandon_checkpoint(root: Path, step: int) -> None:
    """Delete the temporary folder of a save that failed, as far as that is possible."""
    shutil.rmtree(temporary_folder(root, step), ignore_errors=True)


def _missing(folder: Path) -> list[str]:
    """The files that a checkpoint lacks: its manifest, or files of ranks. Not whether they are undamaged."""
    if not (folder / MANIFEST_FILE).is_file():
        return [MANIFEST_FILE]
    ranks = range(read_manifest(folder).topology.world_size)
    return [path.name for rank in ranks for path in rank_files(folder, rank) if not path.is_file()]


def _checkpoints(root: Path) -> dict[int, Path]:
    """All folders of checkpoints in a run's folder, complete or not, by step."""
    found: dict[int, Path] = {}
    for prefix in (_REPLACED, ""):
        for folder in root.glob(f"{prefix}iter_*"):
            match = _NAME.fullmatch(folder.name.removeprefix(prefix))
            if match and folder.is_dir():
                found[int(match[1])] = folder
    return dict(sorted(found.items()))


def latest_step(root: Path) -> int | None:
    """The step of the checkpoint that `latest` names, whether that is there or not; None if it names none."""
    latest = root / LATEST_FILE
    named = _NAME.fullmatch(latest.read_text(errors="replace").strip()) if latest.is_file() else None
    return int(named[1]) if named else None


def complete_checkpoints(root: Path) -> dict[int, Path]:
    """The folders of the checkpoints that have all their files and a sound manifest, by step."""
    found = {}
    for step, folder in _checkpoints(root).items():
        with suppress(CheckpointError):
            if not _missing(folder):
                found[step] = folder
    return found


def newest_checkpoint(root: Path) -> Path | None:
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


def find_checkpoint(path: Path) -> Path:
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
        problem = "no complete checkpoint" if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: {problem}; {_listing(path)}: give another to load")
    return found


def _listing(folder: Path) -> str:
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


def require_own_folder(folder: Path, checkpoint: Path | None) -> None:
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


def claim_run_folder(folder: Path, checkpoint: Path | None) -> None:
    """Make `folder` where a run saves that starts from `checkpoint`.

    Raises:
        ConfigError: as `require_own_folder`.
        CheckpointError: it cannot be written.
    """
    require_own_folder(folder, checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_bytes(bytes(4096))
        (folder / ".writable").unlink()
    except OSError as error:
        raise CheckpointError(
            f"--save {folder}: {error.strerror}: give a folder that can be written, on a disk that all "
            "ranks share"
        ) from error

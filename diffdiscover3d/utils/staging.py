"""Results that consist of several files: written to a staging folder and moved into place as one.

Before the first file is moved, the planned moves are recorded in a journal in the staging folder, and files that will
be replaced are kept beside it. An error during the moves restores them. If the process is killed, the next command that
writes to the folder, or reads its results, completes the moves.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.errors import OutputError
from diffdiscover3d.utils.files import (
    MODEL_MARKERS,
    clear_temporary_files,
    output_errors,
    read_json,
    remove_empty,
    set_permissions,
    sync,
)
from diffdiscover3d.utils.temporary_folders import clear_abandoned, temporary_folder

_PREFIX = ".diffdiscover3d."
_JOURNAL, _UNDO = "journal.json", "undo.json"
_JOURNALS = (_JOURNAL, _UNDO)  # deleted first: without them a staging folder is no unfinished commit
_REPLACED, _NEW = "replaced", "new"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux, see renameat2(2)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextlib.contextmanager
def staged_folder(target: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty staging folder. On success its files are moved into `target`, on error they are deleted.

    Other files in `target` are not modified. The file that identifies a model folder is removed first and moved last,
    so that a mixture of an old and a new model cannot be loaded.

    Args:
        target: folder of the results; created if it does not exist.
        overwrite: replace existing files. If it is not set, a file that appears in `target` meanwhile is an error.

    Raises:
        OutputError: if the folder cannot be created or written to, the disk is full, or a file exists.
    """
    target = Path(target)
    with _staging_folder(target) as staging:
        yield staging / _NEW
        _commit(staging, target, overwrite)


@contextlib.contextmanager
def replaced_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target`, with all that is in it, on success only.

    On Linux the two are exchanged in one step, so that there is always one of them. On other systems and some network
    drives there are two renames; if the process is killed between them, [`recover_folder`] of the parent, or the next
    command that writes there, completes them.

    Args:
        target: a folder, or a place where one will be.

    Raises:
        OutputError: if it cannot be written, or the disk is full.
    """
    target = Path(target)
    with _staging_folder(target.parent) as staging:
        new = staging / _NEW / target.name
        new.mkdir()
        yield new
        set_permissions([*new.rglob("*"), new])
        for path in (*new.rglob("*"), new):
            sync(path)
        if not target.exists():
            os.rename(new, target)
        elif not _exchange(new, target):
            _record(staging / _JOURNAL, [target.name])
            kept = _set_aside(target, staging, 0)
            try:
                os.rename(new, target)
            except OSError:
                os.rename(kept, target)
                raise
        sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; `False` if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextlib.contextmanager
def _staging_folder(target: Path) -> Iterator[Path]:
    """A locked staging folder in `target`, which is created if need be; an empty `target` is removed in the end."""
    missing = [p for p in (target, *target.parents) if not p.exists()]
    try:
        with output_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            recover_folder(target)
            with temporary_folder(target, _PREFIX, _JOURNALS) as staging:
                (staging / _NEW).mkdir()
                yield staging
    finally:
        remove_empty(missing)


def recover_folder(target: str | Path) -> None:
    """Complete the interrupted moves of killed processes in a folder, and delete their staging folders.

    Raises:
        OutputError: if a recorded move cannot be completed.
    """
    target = Path(target)
    with output_errors(target):
        clear_abandoned(target, _PREFIX, lambda staging: _recover(staging, target), _JOURNALS)
    clear_temporary_files(target)


def _commit(staging: Path, target: Path, overwrite: bool) -> None:
    def order(path: Path):
        name = path.relative_to(staging / _NEW).as_posix()
        return name in MODEL_MARKERS, path.suffix == ".json", path

    stores = [p for p in (staging / _NEW).iterdir() if p.is_dir() and p.suffix == ".zarr"]  # moved as a whole
    files = [p for p in (staging / _NEW).rglob("*") if p.is_file()]
    single = [p for p in files if not any(p.is_relative_to(store) for store in stores)]
    moves = [(p, target / p.relative_to(staging / _NEW)) for p in (*stores, *sorted(single, key=order))]
    for source, place in moves:
        if source.is_file() and place.is_dir():
            raise OutputError(f"{place}: is a folder where a file must be written; choose another output folder.")
    set_permissions(files)
    for file in files:
        sync(file)
    if not overwrite:
        _create(moves)
        return
    names = [place.relative_to(target).as_posix() for _, place in moves]
    _record(staging / _JOURNAL, names)
    kept: list[tuple[Path, Path | None]] = []  # what was moved, and where the file is that it replaced
    try:
        for name in MODEL_MARKERS:
            if name in names and (target / name).exists():
                kept.append((target / name, _set_aside(target / name, staging, len(kept))))
        for file, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            kept.append((place, _set_aside(place, staging, len(kept)) if place.exists() else None))
            os.replace(file, place)
    except OSError:
        undo = [[p.relative_to(target).as_posix(), b and b.name] for p, b in reversed(kept)]
        _record(staging / _UNDO, undo)
        _restore(staging, target, undo)
        raise
    for folder in {place.parent for _, place in moves}:
        sync(folder)


def _record(path: Path, value: list) -> None:
    """Write a journal; it is on disk when this returns."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def _restore(staging: Path, target: Path, undo: list) -> None:
    """Put replaced files back, and remove new ones from places that were free."""
    for name, backup in undo:
        place = target / name
        if backup is not None and (staging / _REPLACED / backup).exists():
            os.replace(staging / _REPLACED / backup, place)
        elif backup is None and not (staging / _NEW / name).exists():
            _remove(place)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_aside(place: Path, staging: Path, number: int) -> Path:
    """Move a file that will be replaced into the staging folder."""
    backup = staging / _REPLACED / str(number)
    backup.parent.mkdir(exist_ok=True)
    os.replace(place, backup)
    return backup


def _create(moves: list[tuple[Path, Path]]) -> None:
    """Move files to places that must be free; if one is taken, those moved before are removed."""
    done = []
    try:
        for file, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)  # unlike a rename, it fails if the place is taken
            except FileExistsError as error:
                raise OutputError(
                    f"{place}: was created by another program meanwhile; use --overwrite to replace it."
                ) from error
            except OSError as error:  # no hard links on this file system
                if place.exists():
                    raise OutputError(
                        f"{place}: was created by another program meanwhile; use --overwrite to replace it."
                    ) from error
                os.rename(file, place)
            done.append(place)
    except OSError:
        for place in done:
            _remove(place)
        raise
    for folder in {place.parent for place in done}:
        sync(folder)


def _recover(staging: Path, target: Path) -> None:
    """Finish what a killed process had begun: restore the old files if it did so, otherwise move the new ones."""
    undo = _read(staging / _UNDO)
    if undo is not None:
        _restore(staging, target, [entry for entry in undo if _is_entry(entry)])
        return
    for name in filter(_is_inside, _read(staging / _JOURNAL) or []):
        source, place = staging / _NEW / name, target / name
        if source.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir() and place.exists():  # only an empty folder can be replaced by a rename
                shutil.rmtree(staging / _REPLACED, ignore_errors=True)
                _set_aside(place, staging, 0)
            os.replace(source, place)


def _read(path: Path) -> list | None:
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return None  # the step it records had not begun
    return value if isinstance(value, list) else None


def _is_entry(entry) -> bool:
    """Whether an entry of the journal of an undone commit has its form: a place, and a backup's name or none."""
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and _is_inside(entry[0])
        and (entry[1] is None or (_is_inside(entry[1]) and "/" not in entry[1]))
    )


def _is_inside(name) -> bool:
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts

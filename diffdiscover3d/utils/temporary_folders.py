"""Hidden temporary folders beside results. Each is locked by its process, so that those of killed processes are found.

The operating system releases a lock when its process ends, however it ends. On file systems without locks (some network
drives) and on Windows no folder counts as abandoned.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from diffdiscover3d.utils.handles import hold, release

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_OWNER = "owner"


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str, delete_first: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a new locked folder, and delete it in the end.

    Args:
        parent: folder in which it is created, readable by its owner only.
        prefix: of its name; the rest is random.
        delete_first: names of files in it that are deleted before all others.

    Raises:
        OSError: if it cannot be created.
    """
    folder, owner = _create(parent, prefix)
    hold(owner)
    try:
        yield folder
    finally:
        try:
            _delete(folder, delete_first)
        finally:
            release(owner)


def clear_abandoned(
    parent: Path, prefix: str, finish: Callable[[Path], None] = lambda _: None, delete_first: Sequence[str] = ()
) -> None:
    """Delete the temporary folders of killed processes.

    Args:
        parent, prefix, delete_first: as for [`temporary_folder`].
        finish: called with each, before it is deleted.
    """
    if fcntl is None:
        return
    for name in _names(parent, prefix):
        folder = parent / name
        if (owner := _claim(folder)) is None:  # its process is running, or another deletes it
            with contextlib.suppress(OSError):
                folder.rmdir()  # empty if its process was killed before it had claimed it, or at the very end
            continue
        try:
            if _is_at(owner, folder / _OWNER):
                finish(folder)
                _delete(folder, delete_first)
        finally:
            os.close(owner)


def _names(parent: Path, prefix: str) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            found = [entry for entry in entries if entry.name.startswith(prefix)]
            return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _create(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder, and the lock on it if this file system has locks.

    Before it is locked, another process may take the folder for one of a killed process and delete it; then another
    is created.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            owner = _claim(folder, create=True)
        except BlockingIOError:
            continue
        if owner is None and not folder.is_dir():  # removed while it was empty
            continue
        if owner is None or _is_at(owner, folder / _OWNER):
            return folder, owner
        os.close(owner)


def _delete(folder: Path, delete_first: Sequence[str]) -> None:
    """Delete a folder, the lock last."""
    for name in delete_first:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # deleted by the user; what cannot be deleted is left for the next process
        for path in folder.iterdir():
            if path.name != _OWNER:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / _OWNER).unlink(missing_ok=True)
        folder.rmdir()


def _claim(folder: Path, create: bool = False) -> int | None:
    """Lock a folder; `None` if this file system has no locks or, unless `create`, its process is running.

    Raises:
        BlockingIOError: if another process has locked a folder that is being created.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if create and isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _is_at(handle: int, path: Path) -> bool:
    """Whether a path is that of an open file, which may have been deleted."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False

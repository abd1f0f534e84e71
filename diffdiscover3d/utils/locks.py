"""A lock on a folder that ends with the process that holds it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.errors import OutputError
from diffdiscover3d.utils.files import output_error, remove_empty
from diffdiscover3d.utils.handles import hold, release

_NAME = ".lock"


@contextlib.contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder within the context.

    The operating system releases the lock when the process ends, however it ends. File systems without locks (some
    network drives) are used without one. A folder that did not exist is created, and removed again if nothing has been
    written to it.

    Args:
        folder: the empty file `.lock` stays in it.

    Raises:
        OutputError: if another process holds the lock, or the folder cannot be written to.
    """
    folder = Path(folder)
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        handle = _lock(folder)
    except OSError as error:
        remove_empty(missing)
        raise error if isinstance(error, OutputError) else output_error(folder, error) from error
    hold(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if missing and [path.name for path in folder.iterdir()] in ([_NAME], []):
                (folder / _NAME).unlink(missing_ok=True)
                remove_empty(missing)
        release(handle)


def _lock(folder: Path) -> int | None:
    """Create a folder and lock it; `None` on systems without locks."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    while True:
        handle = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise OutputError(
                f"{folder}: another process is writing to this folder; wait for it, or choose another folder."
            ) from error
        except OSError:  # no locks on this file system
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), (folder / _NAME).stat()):
                return handle
        os.close(handle)  # removed by a process that has just ended
        folder.mkdir(parents=True, exist_ok=True)

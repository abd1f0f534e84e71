"""A lock on a folder that ends with the process that holds it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from diffdiscover3d.errors import OutputError

_NAME = ".lock"


@contextlib.contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder within the context.

    The operating system releases the lock when the process ends, however it ends. File systems without locks (some
    network drives) are used without one.

    Args:
        folder: must exist; the empty file `.lock` stays in it.

    Raises:
        OutputError: if another process holds the lock.
    """
    path = Path(folder) / _NAME
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"{path}: cannot be created ({error}); choose another folder.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder}: another process is writing to this folder; wait for it, or choose another folder."
            ) from error
        except OSError:  # no locks on this file system
            pass
        yield
    finally:
        os.close(handle)

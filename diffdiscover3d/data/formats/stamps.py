"""Notice files that change while a library reads them by their paths."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.files import sha256

_COARSEST_NS = 2 * 10**9  # step of the time stamps of FAT; those of other file systems are finer


class StampedFiles:
    """The files of a volume as they were before a library opened them.

    Most formats are read by libraries that open paths, so their bytes cannot be hashed on the way. Instead, inode, size
    and times of every file are compared before and after; files that were changed within the last two seconds are also
    hashed before, because a second change may leave their times equal.

    Args:
        place: file or folder of the volume.
        find: lists the files that it is stored in, sorted.

    Raises:
        InputError: if a file cannot be read.
    """

    def __init__(self, place: Path, find: Callable[[], Sequence[Path]]):
        self.place, self._find = place, find
        files = find()
        self._before = {file: _stamp(file) for file in files}
        recent = time.time_ns() - _COARSEST_NS
        changing = any(max(modified, changed) > recent for *_, modified, changed in self._before.values())
        self._sha256 = files_sha256(place, files) if changing else None

    def sha256(self) -> str:
        """The hash of [`files_sha256`], once everything has been read.

        Raises:
            InputError: if a file is not what it was before it was opened.
        """
        files = self._find()
        found = files_sha256(self.place, files)
        if {file: _stamp(file) for file in files} != self._before or self._sha256 not in (None, found):
            raise InputError(
                f"{self.place}: changed while it was being read; run again when it is no longer written to."
            )
        return found


def files_sha256(place: Path, files: Sequence[Path]) -> str:
    """The sha256 of the file of a volume; of several files, or a folder, that over their sha256 in the given order.

    Raises:
        InputError: if a file cannot be read.
    """
    try:
        if list(files) == [place]:
            return sha256(place)
        digest = hashlib.sha256()
        for file in files:
            digest.update(sha256(file).encode())
        return digest.hexdigest()
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({error}); run again when it is no longer written to.") from error


def _stamp(file: Path) -> tuple[int, int, int, int, int]:
    try:
        found = file.stat()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); copy it again.") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

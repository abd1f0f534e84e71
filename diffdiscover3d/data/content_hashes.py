"""The sha256 of many files, kept in the cache folder so that only files that have changed are read again."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.data.cache import cache_folder
from diffdiscover3d.errors import InputError, OutputError
from diffdiscover3d.utils.files import read_json_object, sha256, write_json

_COARSEST_NS = 2 * 10**9  # a file that was changed more recently may change again with equal times


def content_hashes(paths: Sequence[Path], folder: str | Path | None = None) -> list[str]:
    """The sha256 of each file, in hexadecimal.

    A hash is taken from the cache if size, inode, modification and change time of the file are those of before.

    Args:
        paths: of the files.
        folder: of the cache; default: `sha256` in [`cache_folder`]. If it cannot be written, all files are read.

    Raises:
        InputError: if a file cannot be read.
    """
    places = [os.path.realpath(path) for path in paths]
    name = hashlib.sha256(json.dumps(sorted(set(places))).encode()).hexdigest()[:24]
    store = Path(folder or cache_folder() / "sha256") / f"{name}.json"
    known = read_json_object(store)
    found = {place: _hash(Path(place), known.get(place)) for place in dict.fromkeys(places)}
    if (lasting := {place: entry for place, entry in found.items() if entry[2]}) != known:
        with contextlib.suppress(OutputError):
            write_json(store, lasting)
    return [found[place][1] for place in places]


def _hash(path: Path, known) -> list:
    """Stamp and sha256 of a file, and whether they may be kept."""
    try:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        if isinstance(known, list) and len(known) == 3 and known[0] == stamp:
            return known
        lasting = max(stat.st_mtime_ns, stat.st_ctime_ns) < time.time_ns() - _COARSEST_NS
        return [stamp, sha256(path), lasting]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); copy it again.") from error

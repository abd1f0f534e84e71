"""Atomic writing of files and folders: written under a temporary name next to the target, synced and renamed."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffdiscover3d.errors import DiffDiscoverError, ModelError, OutputError
from diffdiscover3d.utils.temporary_folders import clear_abandoned, temporary_folder

_LARGEST_JSON = 2**28  # bytes
TEMPORARY_PREFIX = ".diffdiscover3d-file."  # prefix of the hidden folders of [`atomic_file`]
_CLEAR_AGAIN = 60.0  # seconds after which a folder is looked through again
_CLEARED: dict[Path, float] = {}  # when this process last looked through a folder
_DISK_MARGIN = 2**20  # bytes to leave free for small files next to a large one
MODEL_MARKERS = ("model_index.json", "config.json")  # files that identify a model folder


@contextlib.contextmanager
def atomic_file(target: str | Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside the target. It is renamed to the target on success, or deleted on error.

    It is in a hidden folder that its process locks. If the process is killed, the next one that writes a file to the
    folder of the target deletes it; a process looks for such folders at most once a minute, as the target's folder may
    contain thousands of files.

    Args:
        target: path of the file to write.
        suffix: suffix of the temporary path, for writers that depend on it (such as ".nii.gz").

    Raises:
        OutputError: if the folder cannot be created or written to, or the disk is full.
    """
    target = Path(target)
    with _temporary_beside(target) as folder:
        temporary = folder / f"new{suffix or '.tmp'}"
        temporary.touch(mode=0o600)
        yield temporary
        sync(temporary)
        set_permissions([temporary])
        os.replace(temporary, target)
        sync(target.parent)


def clear_temporary_files(folder: Path) -> None:
    """Delete the temporary files that killed processes have left in a folder; see [`atomic_file`]."""
    _CLEARED[folder] = time.monotonic()
    with contextlib.suppress(OSError):  # what cannot be deleted stays
        clear_abandoned(folder, TEMPORARY_PREFIX)


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """As [`atomic_file`], for a folder that must not exist."""
    target = Path(target)
    with _temporary_beside(target) as folder:
        temporary = folder / "new"
        temporary.mkdir()
        yield temporary
        set_permissions([*temporary.rglob("*"), temporary])
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        os.rename(temporary, target)
        sync(target.parent)


@contextlib.contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if time.monotonic() - _CLEARED.get(target.parent, -math.inf) > _CLEAR_AGAIN:
            clear_temporary_files(target.parent)
        with temporary_folder(target.parent, TEMPORARY_PREFIX) as folder:
            yield folder


@dataclass(frozen=True)
class Scratch:
    """An anonymous temporary file for writing and reading.

    Attributes:
        raw: the open, unbuffered file.
        folder: folder on whose disk the file is stored.
    """

    raw: BinaryIO
    folder: Path

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Context in which an OSError is converted to an OutputError for this file."""
        with output_errors(self.folder):
            yield


@contextlib.contextmanager
def scratch_file(folder: str | Path, size: int) -> Iterator[Scratch]:
    """Yield an anonymous temporary file for data larger than memory. It is deleted even if the process is killed.

    Args:
        folder: folder on the disk to use; it need not exist. Use the output folder, because the system folder for
            temporary files is often in memory.
        size: required space in bytes.

    Raises:
        OutputError: if the folder cannot be written to, or has too little free space.
    """
    folder = _existing(Path(folder))
    free = shutil.disk_usage(folder).free
    if free < size + _DISK_MARGIN:
        raise OutputError(
            f"{folder}: {size / 2**30:.1f} GiB of temporary space are needed and {free / 2**30:.1f} GiB are free; "
            "free some space or choose another output folder."
        )
    with contextlib.ExitStack() as stack:
        with output_errors(folder):
            raw = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
        yield Scratch(raw, folder)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove empty folders, deepest first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_folder(folder: Path) -> None:
    """Check that files can be created in a folder, without creating the folder."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise OutputError(f"{folder}: {existing} is not a folder; choose another output folder.")
    probe = existing / f".diffdiscover3d-{os.getpid()}-{time.time_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{existing}: cannot be written to ({error.strerror}); choose another output folder."
        ) from error
    if shutil.disk_usage(existing).free < 2**20:
        raise OutputError(f"{existing}: the disk is full; free some space or choose another output folder.")


def _existing(folder: Path) -> Path:
    """The folder, or its nearest existing ancestor."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_targets(targets: Iterable[Path], overwrite: bool) -> None:
    """Check that all targets can be written.

    Raises:
        OutputError: if a folder is not writable, or a target exists and `overwrite` is not set.
    """
    targets = list(targets)
    for folder in {target.parent for target in targets}:
        check_folder(folder)
    for target in targets:
        if target.exists() and not overwrite:
            raise OutputError(f"{target}: already exists; use --overwrite to replace it.")


def write_json(target: str | Path, value) -> None:
    """Write a value as indented JSON, atomically."""
    # bytes of names that are not UTF-8 become JSON escapes, which are read back as these bytes
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(target: str | Path, text: str) -> None:
    """Write a text in UTF-8, atomically, with its line ends as they are; what UTF-8 lacks is escaped."""
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def check_regular(path: str | Path) -> None:
    """Refuse a named pipe, socket, device or folder where a file is read: opening a pipe would wait for a writer.

    Raises:
        OSError: if it is none, or missing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "Not a file", str(path))


def read_json(path: str | Path):
    """Read a JSON file.

    Raises:
        OSError: if it is missing, or not a regular file.
        ValueError: if it is damaged, nested too deeply or larger than 256 MiB.
    """
    path = Path(path)
    check_regular(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"larger than {_LARGEST_JSON} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json_object(path: Path) -> dict:
    """Read a JSON object; empty if the file is missing, damaged or holds something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_model_json(path: Path) -> dict:
    """Read a JSON object from a model folder.

    Raises:
        ModelError: if the file is missing or is not a JSON object.
    """
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be a JSON object, got {type(value).__name__}.")
    return value


def read_record(path: Path, *keys: str) -> dict:
    """Read a JSON object that an earlier run of this program left, with these keys.

    Raises:
        ModelError: if it is missing, damaged, or lacks a key.
    """
    record = read_model_json(path)
    if lacking := [key for key in keys if key not in record]:
        raise ModelError(f"{path}: damaged, lacks `{lacking[0]}`; remove it to compute it again.")
    return record


def read_log(path: Path) -> list[dict]:
    """The rows of a log of JSON lines, with a numeric "step"; torn or damaged lines are left out.

    Raises:
        OSError: if it cannot be read.
    """
    check_regular(path)
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int | float):
                rows.append(row)
    return rows


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):  # Linux
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    umask = os.umask(0)  # elsewhere it cannot be read without setting it
    os.umask(umask)
    return umask


def sync(path: Path) -> None:
    """Flush a file or folder to disk. Some network drives refuse this, which is not an error."""
    refusals = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
    if path.is_dir():
        refusals |= {errno.EPERM, errno.EACCES}
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in refusals:
            raise


def set_permissions(paths: Iterable[Path]) -> None:
    """Give new files and folders the permissions that the umask leaves, where the file system has permissions.

    Temporary files are created for their owner only, and so are those that safetensors writes.
    """
    umask = _umask()
    for path in paths:
        with contextlib.suppress(OSError, NotImplementedError):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                continue
            inherited = mode & stat.S_ISGID if stat.S_ISDIR(mode) else 0  # of a folder shared by a group
            path.chmod((0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask | inherited)


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Context in which an OSError, or the error of safetensors for a full disk, becomes an OutputError."""
    try:
        yield
    except DiffDiscoverError:  # some are OSErrors with a complete message
        raise
    except OSError as error:
        raise output_error(target, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # raised by safetensors for a full disk
            raise
        raise output_error(target, error) from error


def output_error(target: Path, error: Exception) -> OutputError:
    """The OutputError for an OSError while writing to `target`."""
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{target}: cannot be written ({reason}); choose another folder or free some space.")

"""Atomic writing of files and folders: written under a temporary name next to the target, synced and renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from diffdiscover3d.errors import DiffDiscoverError, ModelError, OutputError

_DISK_MARGIN = 2**20  # bytes to leave free for small files next to a large one
_MARKERS = ("model_index.json", "config.json")  # files that identify a model folder


@contextlib.contextmanager
def atomic_file(target: str | Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path in the folder of the target. It is renamed to the target on success, or deleted on error.

    Args:
        target: path of the file to write.
        suffix: suffix of the temporary path, for writers that depend on it (such as ".nii.gz").

    Raises:
        OutputError: if the folder cannot be created or written to, or the disk is full.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=suffix or ".tmp", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise _output_error(target, error) from error
    temporary = Path(name)
    try:
        with _output_errors(target):
            yield temporary
            _sync(temporary)
            # mkstemp creates private files; set the default permissions
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """As [`atomic_file`], for a folder that must not exist."""
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _output_error(target, error) from error
    try:
        with _output_errors(target):
            yield temporary
            for path in temporary.rglob("*"):
                _sync(path)
            _sync(temporary)
            temporary.chmod(0o777 & ~_umask())
            os.rename(temporary, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replaced_folder(target: str | Path) -> Iterator[Path]:
    """As [`atomic_folder`], but replaces an existing folder once the new one is complete."""
    target = Path(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    try:
        with atomic_folder(target) as temporary:
            yield temporary
            if target.exists():
                os.rename(target, aside)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty staging folder. On success its files are moved into `target`, on error they are deleted.

    Use it for results that consist of several files. Other files in `target` are not modified. The file that identifies
    a model folder is removed first and moved last, so that a mixture of an old and a new model cannot be loaded.

    Raises:
        OutputError: if the folder cannot be created or written to, or the disk is full.
    """
    target = Path(target)
    missing = [p for p in (target, *target.parents) if not p.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".diffdiscover3d.", dir=target))
    except OSError as error:
        _remove_empty(missing)
        raise _output_error(target, error) from error
    try:
        with _output_errors(target):
            yield temporary
            _move_all(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(missing)


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
        with _output_errors(self.folder):
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
            "free some space or choose another --output folder."
        )
    with contextlib.ExitStack() as stack:
        with _output_errors(folder):
            raw = stack.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
        yield Scratch(raw, folder)


def _move_all(source: Path, target: Path) -> None:
    def order(path: Path):
        return path.parent == source and path.name in _MARKERS, path.suffix == ".json", path

    files = sorted((p for p in source.rglob("*") if p.is_file()), key=order)
    moves = [(p, target / p.relative_to(source)) for p in files]
    for file, place in moves:
        if place.is_dir():
            raise OutputError(f"{place}: is a folder, expected a file; choose another output folder.")
        _sync(file)
    for marker in _MARKERS:
        if (source / marker).exists():
            (target / marker).unlink(missing_ok=True)
    for file, place in moves:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    for folder in {place.parent for _, place in moves}:
        _sync(folder)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove empty folders, deepest first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_folder(folder: Path) -> None:
    """Check that files can be created in a folder, without creating the folder."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise OutputError(f"{folder}: {existing} is not a folder; choose another --output folder.")
    probe = existing / f".diffdiscover3d-{os.getpid()}-{time.time_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{existing}: cannot be written to ({error.strerror}); choose another --output folder."
        ) from error
    if shutil.disk_usage(existing).free < 2**20:
        raise OutputError(f"{existing}: the disk is full; free some space or choose another --output folder.")


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
    with atomic_file(target) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    """Read a JSON file written by this package."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_model_json(path: Path) -> dict:
    """Read a JSON object from a model folder.

    Raises:
        ModelError: if the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be a JSON object, got {type(value).__name__}.")
    return value


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    umask = os.umask(0)  # it cannot be read without setting it
    os.umask(umask)
    return umask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _output_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except DiffDiscoverError:  # some are OSErrors with a complete message
        raise
    except OSError as error:
        raise _output_error(target, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # raised by safetensors for a full disk
            raise
        raise _output_error(target, error) from error


def _output_error(target: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{target}: cannot be written ({reason}); choose another folder or free some space.")

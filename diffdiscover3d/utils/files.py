"""Files that are whole or absent: written under a temporary name beside the target, synced, renamed."""

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

_DISK_MARGIN = 2**20  # bytes left free for the small files beside a large one
_MARKERS = ("model_index.json", "config.json")  # a folder holding one of these is taken for a model


@contextlib.contextmanager
def atomic_file(target: str | Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it becomes the target, on an error it vanishes.

    Args:
        target: the file to write.
        suffix: ending of the temporary name, where a writer decides by it (such as ".nii.gz").

    Raises:
        OutputError: if the folder cannot be made or written to, or the disk is full.
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
            # mkstemp makes private files; the result gets the permissions any new file would get
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """The same for a whole folder, which must not exist yet."""
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
    """As `atomic_folder`, in the place of a folder that may exist; that one stays until the new one is there."""
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
    """Yield an empty folder whose files, on success, all move into `target`; on an error none does.

    For results of several files. What `target` already holds under other names stays. The file by which a model is
    recognised goes last, and its older version first, so that no mixture of an old and a new model ever loads.

    Raises:
        OutputError: if the folder cannot be made or written to, or the disk is full.
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
    """A file without a name, to be written and read again.

    Attributes:
        raw: the open file, without a buffer.
        folder: where its bytes lie.
    """

    raw: BinaryIO
    folder: Path

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within the context an OSError is one of this file's disk: it becomes an OutputError."""
        with _output_errors(self.folder):
            yield


@contextlib.contextmanager
def scratch_file(folder: str | Path, size: int) -> Iterator[Scratch]:
    """Yield a file for what is too large for memory; it has no name, so it is gone however the process ends.

    Args:
        folder: where there is room for it, or one that is to be made there; unlike the folder for temporary files, a
            folder for results is seldom kept in memory.
        size: bytes it will take.

    Raises:
        OutputError: if the folder cannot be written to, or has less free.
    """
    folder = _existing(Path(folder))
    free = shutil.disk_usage(folder).free
    if free < size + _DISK_MARGIN:
        raise OutputError(
            f"{folder}: {size / 2**30:.1f} GiB of temporary space are needed and {free / 2**30:.1f} GiB are free; "
            "free some or choose another --output folder."
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
            raise OutputError(f"{place}: is a folder where a file must be written; choose another output folder.")
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
    """Remove folders that were made for nothing, deepest first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_folder(folder: Path) -> None:
    """Make sure a file could be made in the folder, without making the folder yet."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise OutputError(f"{folder}: {existing} is no folder; choose another --output folder.")
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
    """The folder, or the nearest above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def check_targets(targets: Iterable[Path], overwrite: bool) -> None:
    """Find what would stop the writing before the work starts."""
    targets = list(targets)
    for folder in {target.parent for target in targets}:
        check_folder(folder)
    for target in targets:
        if target.exists() and not overwrite:
            raise OutputError(f"{target}: exists already; --overwrite replaces it.")


def write_json(target: str | Path, value) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_file(target) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    """Read a JSON file written by this package."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_model_json(path: Path) -> dict:
    """A JSON object from a model folder.

    Raises:
        ModelError: if the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(value).__name__}.")
    return value


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    umask = os.umask(0)  # there is no way to read it without setting it
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
    except DiffDiscoverError:  # some are OSErrors and say already what went wrong
        raise
    except OSError as error:
        raise _output_error(target, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # what safetensors makes of a full disk
            raise
        raise _output_error(target, error) from error


def _output_error(target: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{target}: cannot be written ({reason}); choose another folder or free some space.")

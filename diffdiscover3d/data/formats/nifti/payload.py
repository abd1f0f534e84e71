"""Sequential, bounded and hashed reading of the bytes of a NIfTI file."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffdiscover3d.errors import InputError

_CHUNK = 2**24  # bytes read at a time; a multiple of the bytes per voxel of every accepted data type
_BEYOND = 2**24  # maximum number of bytes read after the voxels to reach the gzip checksum


class Payload:
    """Sequential reader of the uncompressed bytes of an open `.nii` or `.nii.gz` file.

    All bytes read from disk are hashed, so that the sha256 in a result is that of the bytes used.

    Args:
        path: path of the file, for its suffix and for error messages.
        file: binary file opened for reading, at its start.
    """

    def __init__(self, path: Path, file: io.BufferedReader):
        self.path, self.raw = path, file.raw
        self._disk = _HashedFile(file)
        self._bytes = gzip.GzipFile(fileobj=self._disk, mode="rb") if path.name.lower().endswith(".gz") else self._disk
        self._peeked = b""

    def peek(self, count: int) -> bytes:
        """Return up to `count` first bytes without consuming them. May be called only once."""
        self._peeked = self._bytes.read(count)
        return self._peeked

    def pieces(self, offset: int, length: int, notes: list[str]) -> Iterator[bytes]:
        """Yield (length,) bytes from `offset` in chunks of 16 MiB, then verify the checksum of a `.gz` file.

        At most 16 MiB after these bytes are decompressed, regardless of the size of the stream.

        Raises:
            InputError: if the file is truncated or damaged.
        """
        filled = 0
        try:
            while offset > 0 and (skipped := self._read(min(_CHUNK, offset))):
                offset -= len(skipped)
            while filled < length and (piece := self._read(min(_CHUNK, length - filled))):
                filled += len(piece)
                yield piece
            if filled == length:
                self._read_checksum(notes)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: its data is damaged ({error}); copy it again.") from error
        if filled < length:
            raise InputError(f"{self.path}: truncated, {filled:,} of {length:,} bytes of data; copy it again.")

    def read(self, offset: int, length: int, notes: list[str]) -> np.ndarray:
        """Read (length,) bytes from `offset` as a uint8 array.

        Raises:
            InputError: as for [`pieces`].
        """
        payload, filled = np.empty(length, np.uint8), 0
        for piece in self.pieces(offset, length, notes):
            payload[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
        return payload

    def sha256(self) -> str:
        """Read the rest of the file and return the sha256 of the whole file.

        Raises:
            InputError: if it cannot be read.
        """
        try:
            while self._disk.read(2**20):
                pass
        except OSError as error:
            raise InputError(f"{self.path}: its data is damaged ({error}); copy it again.") from error
        return self._disk.digest.hexdigest()

    def _read(self, count: int) -> bytes:
        peeked, self._peeked = self._peeked[:count], self._peeked[count:]
        return peeked + self._bytes.read(count - len(peeked)) if len(peeked) < count else peeked

    def _read_checksum(self, notes: list[str]) -> None:
        """Read to the end so that gzip verifies its checksum; trailing bytes that are not gzip data add a note."""
        try:
            beyond = 0
            while beyond < _BEYOND and (chunk := self._bytes.read(2**20)):
                beyond += len(chunk)
        except gzip.BadGzipFile as error:
            if not str(error).startswith("Not a gzipped file"):  # wrong checksum
                raise
            notes.append("bytes after the end of the compressed data were ignored")


class _HashedFile:
    """Minimal file object for [`gzip.GzipFile`] that hashes all bytes read."""

    def __init__(self, file: io.BufferedReader):
        self._file, self.digest = file, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        piece = self._file.read(count)
        self.digest.update(piece)
        return piece


@contextmanager
def open_payload(path: Path) -> Iterator[Payload]:
    """Open a `.nii` or `.nii.gz` file, whose compression must match its suffix.

    Raises:
        InputError: if the file is empty or a Git LFS pointer, or its compression does not match its suffix.
        OSError: if the file cannot be opened.
    """
    with open(path, "rb", buffering=2**17) as file:
        start = file.peek(64)[:64]
        if not start:
            raise InputError(f"{path}: the file is empty; copy it again.")
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`.")
        zipped = start.startswith(b"\x1f\x8b")
        if path.name.lower().endswith(".gz") and not zipped:
            web_page = start.lstrip()[:1] == b"<"
            hint = "it looks like a web page: download it again" if web_page else "rename it to .nii if it is one"
            raise InputError(f"{path}: named .gz but not gzip-compressed; {hint}.")
        if zipped and not path.name.lower().endswith(".gz"):
            raise InputError(f"{path}: gzip-compressed but not named .gz; rename it to {path.name}.gz.")
        yield Payload(path, file)

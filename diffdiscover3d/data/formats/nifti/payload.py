"""The bytes of a NIfTI file, read once from start to end: as many as its header declares, all of them hashed."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffdiscover3d.errors import InputError

_CHUNK = 2**24  # a multiple of every voxel's size
_BEYOND = 2**24  # decompressed bytes that may follow the voxels, read to reach the checksum behind them


class Payload:
    """The uncompressed bytes of an open `.nii` or `.nii.gz` file, in order.

    What is read from the disk is hashed on the way, so that a result can name the very bytes it was made from.

    Args:
        path: of the file, for messages and for its ending.
        file: opened for reading in binary mode, at its start.
    """

    def __init__(self, path: Path, file: io.BufferedReader):
        self.path, self.raw = path, file.raw
        self._disk = _HashedFile(file)
        self._bytes = gzip.GzipFile(fileobj=self._disk, mode="rb") if path.name.endswith(".gz") else self._disk
        self._peeked = b""

    def peek(self, count: int) -> bytes:
        """The first bytes, which later reads return again; fewer at the end of the file. To be called once."""
        self._peeked = self._bytes.read(count)
        return self._peeked

    def pieces(self, offset: int, length: int, notes: list[str]) -> Iterator[bytes]:
        """Yield the (length,) bytes from `offset` on in chunks of 16 MiB, then test the checksum of a `.gz` file.

        No more of a compressed file is expanded than this and the 16 MiB after it.

        Raises:
            InputError: if the file is shorter or damaged.
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
        """The (length,) bytes of [`pieces`] as one uint8 array.

        Raises:
            InputError: see [`pieces`].
        """
        payload, filled = np.empty(length, np.uint8), 0
        for piece in self.pieces(offset, length, notes):
            payload[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
        return payload

    def sha256(self) -> str:
        """The sha256 of the whole file, after what is left of it was read from the disk.

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
        """Read to the end, where gzip compares its checksum; trailing bytes that are not gzip data are only noted."""
        try:
            beyond = 0
            while beyond < _BEYOND and (chunk := self._bytes.read(2**20)):
                beyond += len(chunk)
        except gzip.BadGzipFile as error:
            if not str(error).startswith("Not a gzipped file"):  # a wrong checksum
                raise
            notes.append("bytes after the end of the compressed data were ignored")


class _HashedFile:
    """As much of a file object as [`gzip.GzipFile`] needs; every byte that is read goes into the digest, once."""

    def __init__(self, file: io.BufferedReader):
        self._file, self.digest = file, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        piece = self._file.read(count)
        self.digest.update(piece)
        return piece


@contextmanager
def open_payload(path: Path) -> Iterator[Payload]:
    """Open a file whose name ends in `.nii` or `.nii.gz`; its compression must be what its name says.

    Raises:
        InputError: if it is empty, a placeholder or compressed otherwise than its name says.
        OSError: if it cannot be opened.
    """
    with open(path, "rb", buffering=2**17) as file:
        start = file.peek(64)[:64]
        if not start:
            raise InputError(f"{path}: the file is empty; copy it again.")
        if start.startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`.")
        zipped = start.startswith(b"\x1f\x8b")
        if path.name.endswith(".gz") and not zipped:
            web_page = start.lstrip()[:1] == b"<"
            hint = "it looks like a web page: download it again" if web_page else "rename it to .nii if it is one"
            raise InputError(f"{path}: named .gz but not gzip-compressed; {hint}.")
        if zipped and not path.name.endswith(".gz"):
            raise InputError(f"{path}: gzip-compressed but not named .gz; rename it to {path.name}.gz.")
        yield Payload(path, file)

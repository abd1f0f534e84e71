"""The bytes of a NIfTI file, as many as its header asks for and no more."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffdiscover3d.errors import InputError

_CHUNK = 2**24
_BEYOND = 2**24  # so many bytes after the data are read, for the checksum at their end


def open_payload(path: Path) -> io.BufferedIOBase:
    """The file's uncompressed bytes, to be read and sought."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def read_payload(path: Path, offset: int, length: int, notes: list[str]) -> np.ndarray:
    """The (length,) bytes from `offset` on, with the checksum of a `.gz` file tested.

    However much a compressed file would expand to, no more is taken than this and 16 MiB for what may follow.

    Raises:
        InputError: if the file is shorter or damaged.
    """
    payload, filled = np.empty(length, np.uint8), 0
    for piece in _pieces(path, offset, length, notes):
        payload[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
    return payload


def unpack_payload(path: Path, offset: int, length: int, wanted: range, target: BinaryIO, notes: list[str]) -> None:
    """Write those of the (length,) bytes from `offset` on that are `wanted` into an open file, a chunk at a time.

    All are read, so that truncation and wrong checksums are found as by [`read_payload`].

    Raises:
        InputError: if the file is shorter or damaged.
        OSError: if `target` cannot be written.
    """
    at = 0
    for piece in _pieces(path, offset, length, notes):
        first, last = max(wanted.start - at, 0), min(wanted.stop - at, len(piece))
        rest = memoryview(piece)[first : max(first, last)]
        while rest:  # a file without a buffer may take less than it is given
            rest = rest[target.write(rest) :]
        at += len(piece)


def _pieces(path: Path, offset: int, length: int, notes: list[str]) -> Iterator[bytes]:
    filled = 0
    try:
        with open_payload(path) as file:
            file.seek(offset)
            while filled < length and (piece := file.read(min(_CHUNK, length - filled))):
                filled += len(piece)
                yield piece
            if filled == length:
                _read_on(path, file, notes)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: its data is damaged ({error}); copy it again.") from error
    if filled < length:
        raise InputError(f"{path}: truncated, {filled:,} of {length:,} bytes of data; copy it again.")


def _read_on(path: Path, file: io.BufferedIOBase, notes: list[str]) -> None:
    """Read to the end, which makes gzip test its checksum; what is no gzip data after it is no part of the scan."""
    try:
        beyond = 0
        while beyond < _BEYOND and (chunk := file.read(2**20)):
            beyond += len(chunk)
    except gzip.BadGzipFile as error:
        if not str(error).startswith("Not a gzipped file"):  # a wrong checksum
            raise
        notes.append("bytes after the end of the compressed data were ignored")

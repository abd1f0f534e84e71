"""Bounded reading of the data of a NIfTI file."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffdiscover3d.errors import InputError

_CHUNK = 2**24
_BEYOND = 2**24  # maximum number of bytes read after the data to reach the gzip checksum


def open_payload(path: Path) -> io.BufferedIOBase:
    """Open a file as a seekable stream of uncompressed bytes."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def read_payload(path: Path, offset: int, length: int, notes: list[str]) -> np.ndarray:
    """Read (length,) bytes from `offset` and verify the checksum of a `.gz` file.

    At most `length` bytes and another 16 MiB after them are decompressed, regardless of the size of the stream.

    Raises:
        InputError: if the file is truncated or damaged.
    """
    payload, filled = np.empty(length, np.uint8), 0
    for piece in _pieces(path, offset, length, notes):
        payload[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
    return payload


def unpack_payload(path: Path, offset: int, length: int, selection: range, target: BinaryIO, notes: list[str]) -> None:
    """Decompress a range of the (length,) bytes from `offset` to an open file, chunk by chunk.

    All bytes are read, so truncation and wrong checksums are detected as by [`read_payload`].

    Args:
        path: path of the file.
        offset: first byte of the data.
        length: number of bytes of the data.
        selection: range of bytes to write, relative to `offset`.
        target: open file without a buffer.
        notes: list to which warnings are appended.

    Raises:
        InputError: if the file is truncated or damaged.
        OSError: if `target` cannot be written.
    """
    at = 0
    for piece in _pieces(path, offset, length, notes):
        first, last = max(selection.start - at, 0), min(selection.stop - at, len(piece))
        rest = memoryview(piece)[first : max(first, last)]
        while rest:  # an unbuffered write may be partial
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
    """Read to the end so that gzip verifies its checksum; trailing bytes that are not gzip data are ignored."""
    try:
        beyond = 0
        while beyond < _BEYOND and (chunk := file.read(2**20)):
            beyond += len(chunk)
    except gzip.BadGzipFile as error:
        if not str(error).startswith("Not a gzipped file"):  # wrong checksum
            raise
        notes.append("bytes after the end of the compressed data were ignored")

"""One volume's voxels in an uncompressed file, read and written by boxes, so that the rest never is in memory.

Mapping the file would do too, but the pages that are touched count as the process's memory until they are dropped.
"""

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from nibabel.orientations import apply_orientation

Region = tuple[slice, slice, slice]
SLAB_VOXELS = 2**22  # in one step of a pass over a volume, unless a single plane holds more


class RawGrid:
    """Voxels as a NIfTI file stores them, first axis fastest, that are asked for in canonical orientation.

    A region is three slices (with start and stop) of the canonical volume; planes lie along the file's last axis.

    Args:
        file: open without a buffer, to be read and, for results, written.
        shape: (nx, ny, nz), on the file's own axes.
        dtype: as stored.
        orientation: of the file's axes, as `nibabel.orientations.io_orientation` gives it.
        offset: of the first voxel, in bytes.
    """

    def __init__(self, file: BinaryIO, shape: Sequence[int], dtype: np.dtype, orientation: np.ndarray, offset: int = 0):
        self.file, self.shape, self.dtype, self.offset = file, tuple(shape), np.dtype(dtype), offset
        self.orientation = orientation
        # for each axis of the file: the canonical axis it lies along, and whether it runs against it
        self.axes = tuple(int(axis) for axis in orientation[:, 0])
        self.flipped = tuple(bool(direction < 0) for direction in orientation[:, 1])

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """(H, W, D), along right, anterior, superior."""
        return tuple(self.shape[self.axes.index(axis)] for axis in range(3))

    def slabs(self, voxels: int | None = None) -> Iterator[tuple[int, int]]:
        """First and last plane (exclusive) of slabs of at most so many voxels (default: 4 Mi), but at least a plane."""
        step = max(1, (voxels or SLAB_VOXELS) // (self.shape[0] * self.shape[1]))
        for start in range(0, self.shape[2], step):
            yield start, min(start + step, self.shape[2])

    def region(self, box: Sequence[tuple[int, int]]) -> Region:
        """The canonical region of a box given by first and last voxel (exclusive) on the file's own axes."""
        slices = [slice(0)] * 3
        for axis, flipped, length, (start, stop) in zip(self.axes, self.flipped, self.shape, box, strict=True):
            slices[axis] = slice(length - stop, length - start) if flipped else slice(start, stop)
        return tuple(slices)

    def slab_region(self, start: int, stop: int) -> Region:
        """The canonical region of the planes from `start` to `stop`."""
        return self.region(((0, self.shape[0]), (0, self.shape[1]), (start, stop)))

    def read(self, region: Region) -> np.ndarray:
        """The stored numbers in a region, (h, w, d)."""
        mine = [region[axis] for axis in self.axes]
        (x, y, z) = (
            slice(n - s.stop, n - s.start) if flipped else s
            for s, n, flipped in zip(mine, self.shape, self.flipped, strict=True)
        )
        return self.to_canonical(self._read_box(x, y, z))

    def read_planes(self, start: int, stop: int) -> np.ndarray:
        """The stored numbers of whole planes, (stop - start, ny, nx)."""
        return self._read_box(slice(0, self.shape[0]), slice(0, self.shape[1]), slice(start, stop))

    def write_rows(self, plane: int, row: int, values: np.ndarray) -> None:
        """Write (rows, nx) numbers into a plane, from a row on."""
        self.file.seek(self._position(plane, row))
        view = memoryview(np.ascontiguousarray(values, self.dtype)).cast("B")
        while view:  # an unbuffered file may take less than it is given
            view = view[self.file.write(view) :]

    def to_canonical(self, box: np.ndarray) -> np.ndarray:
        """Turn a (planes, rows, columns) box of the file into canonical orientation."""
        return apply_orientation(box.T, self.orientation)

    def _position(self, plane: int, row: int) -> int:
        width, height, _ = self.shape
        return self.offset + (plane * height + row) * width * self.dtype.itemsize

    def _read_box(self, x: slice, y: slice, z: slice) -> np.ndarray:
        planes, rows, width = z.stop - z.start, y.stop - y.start, self.shape[0]
        out = np.empty((planes, rows, x.stop - x.start), self.dtype)
        if out.shape[1:] == (self.shape[1], width):  # in one go: they lie side by side
            self._fill(out, z.start, 0)
            return out
        lines = np.empty((rows, width), self.dtype)
        for number in range(planes):
            self._fill(lines, z.start + number, y.start)
            out[number] = lines[:, x]
        return out

    def _fill(self, out: np.ndarray, plane: int, row: int) -> None:
        self.file.seek(self._position(plane, row))
        view = memoryview(out.reshape(-1).view(np.uint8))
        while view:
            count = self.file.readinto(view)
            if not count:
                raise OSError("the file has become shorter")
            view = view[count:]

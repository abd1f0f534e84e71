"""Region-wise reading and writing of the voxels of a volume in an uncompressed file.

The file is not memory-mapped, because mapped pages count towards the memory of the process until they are evicted.
"""

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from nibabel.orientations import apply_orientation

Region = tuple[slice, slice, slice]
SLAB_VOXELS = 2**22  # maximum number of voxels per slab, unless a single plane has more


class RawGrid:
    """Access in canonical orientation to voxels stored as in a NIfTI file, first axis fastest.

    A region is a tuple of three slices (with start and stop) of the canonical volume. Planes are indexed along the last
    axis of the file.

    Args:
        file: unbuffered binary file, opened for reading and, for results, writing.
        shape: (nx, ny, nz) on the axes of the file.
        dtype: stored data type.
        orientation: orientation of the axes of the file, from `nibabel.orientations.io_orientation`.
        offset: offset of the first voxel, in bytes.
    """

    def __init__(self, file: BinaryIO, shape: Sequence[int], dtype: np.dtype, orientation: np.ndarray, offset: int = 0):
        self.file, self.shape, self.dtype, self.offset = file, tuple(shape), np.dtype(dtype), offset
        self.orientation = orientation
        # for each axis of the file: the corresponding canonical axis, and whether its direction is reversed
        self.axes = tuple(int(axis) for axis in orientation[:, 0])
        self.flipped = tuple(bool(direction < 0) for direction in orientation[:, 1])

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """(H, W, D) in RAS+ orientation."""
        return tuple(self.shape[self.axes.index(axis)] for axis in range(3))

    def slabs(self, voxels: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield first and last plane (exclusive) of slabs of at most `voxels` (default: 4 Mi), or of a single plane."""
        step = max(1, (voxels or SLAB_VOXELS) // (self.shape[0] * self.shape[1]))
        for start in range(0, self.shape[2], step):
            yield start, min(start + step, self.shape[2])

    def region(self, box: Sequence[tuple[int, int]]) -> Region:
        """The canonical region of a box given by first and last voxel (exclusive) on the axes of the file."""
        slices = [slice(0)] * 3
        for axis, flipped, length, (start, stop) in zip(self.axes, self.flipped, self.shape, box, strict=True):
            slices[axis] = slice(length - stop, length - start) if flipped else slice(start, stop)
        return tuple(slices)

    def slab_region(self, start: int, stop: int) -> Region:
        """The canonical region of the planes from `start` to `stop`."""
        return self.region(((0, self.shape[0]), (0, self.shape[1]), (start, stop)))

    def read(self, region: Region) -> np.ndarray:
        """Read the stored values in a region, (h, w, d)."""
        on_file_axes = [region[axis] for axis in self.axes]
        (x, y, z) = (
            slice(n - s.stop, n - s.start) if flipped else s
            for s, n, flipped in zip(on_file_axes, self.shape, self.flipped, strict=True)
        )
        return self.to_canonical(self._read_box(x, y, z))

    def read_planes(self, start: int, stop: int) -> np.ndarray:
        """Read the stored values of complete planes, (stop - start, ny, nx)."""
        return self._read_box(slice(0, self.shape[0]), slice(0, self.shape[1]), slice(start, stop))

    def write_rows(self, plane: int, row: int, values: np.ndarray) -> None:
        """Write (rows, nx) values to a plane, starting at `row`."""
        self.file.seek(self._position(plane, row))
        view = memoryview(np.ascontiguousarray(values, self.dtype)).cast("B")
        while view:  # an unbuffered write may be partial
            view = view[self.file.write(view) :]

    def to_canonical(self, box: np.ndarray) -> np.ndarray:
        """Convert a (planes, rows, columns) box of the file to canonical orientation."""
        return apply_orientation(box.T, self.orientation)

    def _position(self, plane: int, row: int) -> int:
        width, height, _ = self.shape
        return self.offset + (plane * height + row) * width * self.dtype.itemsize

    def _read_box(self, x: slice, y: slice, z: slice) -> np.ndarray:
        planes, rows, width = z.stop - z.start, y.stop - y.start, self.shape[0]
        out = np.empty((planes, rows, x.stop - x.start), self.dtype)
        if out.shape[1:] == (self.shape[1], width):  # contiguous in the file
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
                raise OSError("the file was truncated while it was read")
            view = view[count:]

"""Region-wise access to scans larger than memory, with the validation of `read_nifti`."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation

from diffdiscover3d.data.formats.nifti.header import length_unit, read_affine
from diffdiscover3d.data.formats.nifti.raw_grid import SLAB_VOXELS, RawGrid, Region
from diffdiscover3d.data.formats.nifti.source import NiftiFile
from diffdiscover3d.data.formats.nifti.voxels import (
    check_contrast,
    check_finite,
    check_overflows,
    count_overflows,
    may_lose_precision,
    pick_volume,
    read_scaling,
    stored_range,
    to_float32,
    without_offset,
)
from diffdiscover3d.data.formats.volume_file import NiftiGrid, ResultGrid
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.files import scratch_file


@dataclass(frozen=True)
class SlabScan:
    """An open scan in canonical (RAS+) orientation that is read region by region.

    Attributes:
        path: path of the file.
        grid: the stored values.
        affine: (4, 4) affine from canonical voxels to millimetres.
        header: the unmodified header of the file.
        scaling: slope and intercept of the stored values, `None` for 1 and 0.
        low, high: minimum and maximum of the whole scan.
        notes: warnings about the file for the user.
        sha256: of the file's bytes, hashed while they were read.
        private: the voxels are a decompressed copy, which nothing else can change.
        unit, anatomical, results: as of [`VolumeFile`].
    """

    path: Path
    grid: RawGrid
    affine: np.ndarray
    header: nib.Nifti1Header
    scaling: tuple[float, float] | None
    low: np.float32
    high: np.float32
    notes: tuple[str, ...]
    sha256: str
    private: bool
    results: ResultGrid
    unit: str = "mm"
    anatomical: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, D) in canonical orientation."""
        return self.grid.canonical_shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the canonical axes, in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def read(self, region: Region) -> np.ndarray:
        """Read the values in a region as finite (h, w, d) float32.

        Raises:
            InputError: if the file cannot be read.
        """
        values = to_float32(_reading(self.path, self.grid.read, region), self.scaling)
        finite = np.isfinite(values)  # non-finite values only occur with `nan_to_zero`
        return values if finite.all() else np.where(finite, values, np.float32(0))

    def normalized(self, region: Region) -> np.ndarray:
        """Read the values in a region, min-max normalised by the range of the whole scan."""
        return (self.read(region) - self.low) / (self.high - self.low)

    def check_unchanged(self) -> None:
        """Hash an uncompressed file again to detect changes since it was opened.

        Raises:
            InputError: if the file has changed.
        """
        if not self.private and _reading(self.path, _sha256, self.grid.file) != self.sha256:
            raise InputError(
                f"{self.path}: changed while it was being read; run again when it is no longer written to."
            )


@contextmanager
def stream_volume(
    file: NiftiFile,
    scratch: str | Path,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
) -> Iterator[SlabScan]:
    """Validate the voxels of an open file in one pass over its bytes and provide region-wise access.

    Args:
        file: file from [`open_nifti`]; its voxels can be read only once.
        scratch: folder for the decompressed voxels of a `.nii.gz`, which are written to an anonymous file.
        volume, nan_to_zero, ignore_affine: as for [`read_nifti`].

    Raises:
        InputError: as for [`read_nifti`].
        OutputError: if the decompressed voxels cannot be written.
    """
    path, header, shape, notes, chosen = file.path, file.header, file.shape, [], []
    affine = read_affine(path, header, ignore_affine, notes)
    orientation = io_orientation(affine)
    scaling = read_scaling(header, notes)
    number = pick_volume(path, shape, volume, chosen)
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    volume_bytes = int(np.prod(shape[:3])) * dtype.itemsize
    selection = range(number * volume_bytes, (number + 1) * volume_bytes)
    with ExitStack() as stack:
        unpacked = (
            stack.enter_context(scratch_file(Path(scratch), volume_bytes))
            if path.name.lower().endswith(".gz")
            else None
        )
        values, at = ValueRange(dtype, scaling), 0
        for piece in file.payload.pieces(offset, int(np.prod(shape)) * dtype.itemsize, notes):
            first, last = max(selection.start - at, 0), min(selection.stop - at, len(piece))
            own = memoryview(piece)[first : max(first, last)]
            if unpacked:
                with unpacked.writing():
                    write_all(unpacked.raw, own)
            values.add(own)
            at += len(piece)
        notes += chosen
        if not (nan_to_zero and values.bad):
            scaling = values.without_offset(notes)
        check_overflows(path, values.overflows)
        check_finite(path, values.bad, int(np.prod(shape[:3])), nan_to_zero, notes)
        check_contrast(path, float(values.low), float(values.high))
        raw, start = (unpacked.raw, 0) if unpacked else (file.payload.raw, offset + selection.start)
        yield SlabScan(
            path,
            RawGrid(raw, shape[:3], dtype, orientation, start),
            affine @ inv_ornt_aff(orientation, shape[:3]),
            header,
            scaling,
            values.low,
            values.high,
            tuple(notes),
            file.payload.sha256(),
            unpacked is not None,
            NiftiGrid(header),
            length_unit(header),
        )


class ValueRange:
    """Running minimum and maximum, and numbers of NaN and Inf voxels and of those outside the range of float32."""

    def __init__(self, dtype: np.dtype, scaling: tuple[float, float] | None):
        self._dtype, self._scaling = dtype, scaling
        self.low, self.high, self.bad = np.float32(np.inf), np.float32(-np.inf), 0
        self.overflows = 0
        self._stored = (np.inf, -np.inf)

    def add(self, stored: memoryview) -> None:
        """Add the bytes of complete voxels. Non-finite values count as 0."""
        numbers = np.frombuffer(stored, self._dtype)
        for start in range(0, len(numbers), SLAB_VOXELS):
            stored = numbers[start : start + SLAB_VOXELS]
            if may_lose_precision(self._dtype):
                low, high = stored_range(stored)
                self._stored = min(self._stored[0], low), max(self._stored[1], high)
            values = to_float32(stored, self._scaling)
            finite = np.isfinite(values)
            if not finite.all():
                self.bad += values.size - int(np.count_nonzero(finite))
                self.overflows += count_overflows(stored, values)
                values = np.where(finite, values, np.float32(0))
            self.low, self.high = min(self.low, values.min()), max(self.high, values.max())

    def without_offset(self, notes: list[str]) -> tuple[float, float] | None:
        """The scaling to read with, see [`without_offset`]; `low` and `high` follow it."""
        scaling = without_offset(self._scaling, self._stored, self._dtype, notes)
        if scaling != self._scaling:
            self.low, self.high = np.sort(to_float32(np.array(self._stored), scaling))
        return scaling


def write_all(file: BinaryIO, rest: memoryview) -> None:
    """Write all bytes to an unbuffered file."""
    while rest:  # an unbuffered write may be partial
        rest = rest[file.write(rest) :]


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(2**22):
        digest.update(piece)
    return digest.hexdigest()


def _reading(path: Path, call, *arguments):
    """Call a function that reads the scan and convert an OSError to an InputError."""
    try:
        return call(*arguments)
    except OSError as error:
        raise InputError(f"{path}: its data cannot be read ({error}); copy it again.") from error

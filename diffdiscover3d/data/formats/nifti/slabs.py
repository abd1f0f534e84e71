"""Scans larger than memory: opened after the checks of `read_nifti`, then read by regions."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation

from diffdiscover3d.data.formats.nifti.header import check_shape, check_size, read_affine, read_header
from diffdiscover3d.data.formats.nifti.payload import unpack_payload
from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid, Region
from diffdiscover3d.data.formats.nifti.voxels import check_contrast, check_finite, pick_volume, read_scaling, to_float32
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.files import scratch_file


@dataclass(frozen=True)
class SlabScan:
    """An open scan in canonical (RAS+) orientation, of which only what is asked for is read.

    Attributes:
        path: its file.
        grid: the stored numbers.
        affine: (4, 4) from canonical voxels to millimetres.
        header: the file's header, unchanged.
        scaling: slope and intercept of the stored numbers, `None` for 1 and 0.
        low, high: the smallest and the largest value of the whole scan.
        notes: what was unusual about the file, in words for the user.
    """

    path: Path
    grid: RawGrid
    affine: np.ndarray
    header: nib.Nifti1Header
    scaling: tuple[float, float] | None
    low: np.float32
    high: np.float32
    notes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, D), in canonical orientation."""
        return self.grid.canonical_shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel along the canonical axes, in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def read(self, region: Region) -> np.ndarray:
        """The values in a region, (h, w, d) float32, finite.

        Raises:
            InputError: if the file cannot be read any more.
        """
        values = to_float32(_reading(self.path, self.grid.read, region), self.scaling)
        finite = np.isfinite(values)  # what is not was refused, or is to be 0
        return values if finite.all() else np.where(finite, values, np.float32(0))

    def normalized(self, region: Region) -> np.ndarray:
        """The same, with the whole scan's smallest value at 0 and its largest at 1."""
        return (self.read(region) - self.low) / (self.high - self.low)


@contextmanager
def open_slabs(
    path: str | Path,
    scratch: str | Path,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
) -> Iterator[SlabScan]:
    """Open a `.nii` or `.nii.gz` file that need not fit into memory, after passing once over its voxels.

    Args:
        path: the file, as for [`read_nifti`].
        scratch: folder for the decompressed voxels of a `.nii.gz`, in a file without a name.
        volume, nan_to_zero, ignore_affine: as for [`read_nifti`].

    Raises:
        InputError: as [`read_nifti`].
        OutputError: if the disk cannot take the decompressed voxels.
    """
    path, notes, chosen = Path(path), [], []
    header = read_header(path)
    shape = check_shape(path, header)
    check_size(path, header, shape)
    affine = read_affine(path, header, ignore_affine, notes)
    orientation = io_orientation(affine)
    scaling = read_scaling(header, notes)
    number = pick_volume(path, shape, volume, chosen)
    with ExitStack() as stack:
        file, offset = _open_voxels(path, header, shape, number, Path(scratch), notes, stack)
        grid = RawGrid(file, shape[:3], header.get_data_dtype(), orientation, offset)
        notes += chosen
        low, high = _survey(path, grid, scaling, nan_to_zero, notes)
        canonical_affine = affine @ inv_ornt_aff(orientation, shape[:3])
        yield SlabScan(path, grid, canonical_affine, header, scaling, low, high, tuple(notes))


def _open_voxels(
    path: Path, header, shape: Sequence[int], number: int, scratch: Path, notes: list[str], stack: ExitStack
) -> tuple[BinaryIO, int]:
    """A file that holds the voxels as they are, and where in it the chosen volume begins."""
    offset, size = int(header["vox_offset"]), header.get_data_dtype().itemsize
    volume_bytes = int(np.prod(shape[:3])) * size
    if not path.name.endswith(".gz"):
        return stack.enter_context(_reading(path, open, path, "rb", buffering=0)), offset + number * volume_bytes
    file = stack.enter_context(scratch_file(scratch, volume_bytes))
    wanted = range(number * volume_bytes, (number + 1) * volume_bytes)
    with file.writing():
        unpack_payload(path, offset, int(np.prod(shape)) * size, wanted, file.raw, notes)
    return file.raw, 0


def _survey(path: Path, grid: RawGrid, scaling, nan_to_zero: bool, notes: list[str]) -> tuple[np.float32, np.float32]:
    """The smallest and the largest value, once all have been looked at."""
    low, high, bad = np.float32(np.inf), np.float32(-np.inf), 0
    for start, stop in grid.slabs():
        values = to_float32(_reading(path, grid.read_planes, start, stop), scaling)
        finite = np.isfinite(values)
        if not finite.all():
            bad += values.size - int(np.count_nonzero(finite))
            values = np.where(finite, values, np.float32(0))
        low, high = min(low, values.min()), max(high, values.max())
    check_finite(path, bad, int(np.prod(grid.shape)), nan_to_zero, notes)
    check_contrast(path, float(low), float(high))
    return low, high


def _reading(path: Path, call, *arguments, **options):
    """Call what reads the scan: that it fails later on is the scan's fault, not that of a result."""
    try:
        return call(*arguments, **options)
    except OSError as error:
        raise InputError(f"{path}: its data cannot be read ({error}); copy it again.") from error

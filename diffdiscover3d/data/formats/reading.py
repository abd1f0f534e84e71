"""Read a volume of any format whole, or open it slab by slab."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff

from diffdiscover3d.data.formats.nifti.raw_grid import SLAB_VOXELS, RawGrid
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, read_nifti
from diffdiscover3d.data.formats.nifti.slabs import SlabScan, open_slabs, survey
from diffdiscover3d.data.formats.nifti.voxels import check_contrast, check_finite, to_float32
from diffdiscover3d.data.formats.registry import is_nifti, open_volume
from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile
from diffdiscover3d.utils.files import scratch_file
from diffdiscover3d.utils.memory import check_memory


def read_volume(
    path: str | Path,
    *,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    allow_constant: bool = False,
    **options,
) -> NiftiVolume:
    """Read a volume of any format whole, in canonical orientation.

    Args:
        path: a file, a folder with a DICOM series, or one of several volumes in either, see `registry`.
        nan_to_zero, ignore_affine, allow_constant: as for [`read_nifti`].
        options: of [`ReadOptions`].

    Returns:
        The volume; lengths are in mm whatever the file's unit is.

    Raises:
        InputError: if it is missing, damaged, no 3D volume of real numbers, or has no contrast.
        MemoryLimitError: if it is larger than this machine's memory.
    """
    if is_nifti(path):
        return read_nifti(
            path,
            volume=options.get("volume"),
            nan_to_zero=nan_to_zero,
            ignore_affine=ignore_affine,
            allow_constant=allow_constant,
        )
    with open_volume(path, ReadOptions(**options)) as volume:
        shape = volume.shape
        check_memory(path, shape, float(np.prod(np.array(shape, float))) * (8 + volume.dtype.itemsize))
        planes = np.empty(shape[::-1], np.float32)
        for start, stop in _slabs(shape):
            planes[start:stop] = to_float32(volume.read_planes(start, stop), volume.scaling)
        notes = list(volume.notes)
        finite = np.isfinite(planes)
        bad = planes.size - int(np.count_nonzero(finite))
        check_finite(path, bad, planes.size, nan_to_zero, notes)
        if bad:
            planes = np.where(finite, planes, np.float32(0))
        check_contrast(path, float(planes.min()), float(planes.max()), allow_constant)
        data = np.ascontiguousarray(apply_orientation(planes.T, volume.orientation))
        return NiftiVolume(
            data,
            volume.affine @ inv_ornt_aff(volume.orientation, shape),
            volume.header,
            volume.orientation,
            tuple(notes),
            volume.unit,
            volume.anatomical,
            volume.results,
        )


@contextmanager
def open_scan(
    path: str | Path, scratch: str | Path, *, nan_to_zero: bool = False, ignore_affine: bool = False, **options
) -> Iterator[SlabScan]:
    """Open a volume of any format that need not fit into memory, after passing once over its voxels.

    Args:
        path, nan_to_zero, options: as for [`read_volume`].
        scratch: folder for the voxels of all formats but uncompressed NIfTI, in a file without a name.

    Raises:
        InputError: as [`read_volume`].
        OutputError: if the disk cannot take the voxels.
    """
    if is_nifti(path):
        reading = {"volume": options.get("volume"), "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}
        with open_slabs(path, scratch, **reading) as scan:
            yield scan
        return
    with open_volume(path, ReadOptions(**options)) as volume:
        dtype = np.dtype(np.uint8) if volume.dtype.kind == "b" else volume.dtype.newbyteorder("=")
        if dtype.itemsize == 2 and dtype.kind == "f":
            dtype = np.dtype(np.float32)
        size = int(np.prod(np.array(volume.shape, dtype=object))) * dtype.itemsize
        with scratch_file(scratch, size) as file:
            for start, stop in _slabs(volume.shape):
                planes = np.ascontiguousarray(volume.read_planes(start, stop), dtype)
                rest = memoryview(planes).cast("B")
                with file.writing():
                    while rest:  # a file without a buffer may take less than it is given
                        rest = rest[file.raw.write(rest) :]
            grid = RawGrid(file.raw, volume.shape, dtype, volume.orientation)
            notes = list(volume.notes)
            low, high = survey(Path(path), grid, volume.scaling, nan_to_zero, notes)
            yield SlabScan(
                Path(path),
                grid,
                volume.affine @ inv_ornt_aff(volume.orientation, volume.shape),
                volume.header,
                volume.scaling,
                low,
                high,
                tuple(notes),
                volume.unit,
                volume.anatomical,
                volume.results,
            )


def volume_info(path: str | Path, **options) -> VolumeFile:
    """What the header of a volume tells, any format but NIfTI; its planes cannot be read any more."""
    with open_volume(path, ReadOptions(**options)) as volume:
        return volume


def _slabs(shape: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    step = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for start in range(0, shape[2], step):
        yield start, min(start + step, shape[2])

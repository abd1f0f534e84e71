"""Read a volume of any format: open it, then read it whole or by regions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from diffdiscover3d.data.formats.nifti.header import read_affine
from diffdiscover3d.data.formats.nifti.raw_grid import SLAB_VOXELS, RawGrid
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, read_voxels
from diffdiscover3d.data.formats.nifti.slabs import SlabScan, ValueRange, stream_volume, write_all
from diffdiscover3d.data.formats.nifti.source import NiftiFile, open_nifti
from diffdiscover3d.data.formats.nifti.voxels import (
    check_contrast,
    check_finite,
    check_overflows,
    checked_values,
    count_overflows,
    has_non_finite,
    may_lose_precision,
    stored_range,
    to_float32,
    without_offset,
)
from diffdiscover3d.data.formats.registry import open_volume, options_in, path_is_nifti, split
from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile
from diffdiscover3d.utils.files import scratch_file
from diffdiscover3d.utils.memory import check_memory

Source = NiftiFile | VolumeFile
_OPTIONS = tuple(field.name for field in fields(ReadOptions))


def read_volume(path: str | Path, **reading) -> NiftiVolume:
    """Read a volume of any format whole, in canonical orientation.

    Args:
        path: a file, a folder with a DICOM series, or one of several volumes in either, see `registry`.
        reading: as for [`read_source`], and the options of [`ReadOptions`].

    Returns:
        The volume; lengths are in mm whatever the file's unit is.

    Raises:
        InputError: if it is missing, damaged, no 3D volume of real numbers, or has no contrast.
        MemoryLimitError: if it is larger than this machine's memory.
    """
    with open_source(path, **reading) as source:
        return read_source(source, **reading | options_in(path))


def grid_of(source: Source) -> tuple[tuple[int, int, int], tuple[float, float, float], str]:
    """Shape and edge lengths in mm of an open volume in canonical orientation, and the unit of its file."""
    if isinstance(source, NiftiFile):
        affine, unit = read_affine(source.path, source.header, True, []), "mm"
        orientation = io_orientation(affine)
    else:
        affine, unit, orientation = source.affine, source.unit, source.orientation
    order = np.argsort(orientation[:, 0])  # the file's axis along each canonical one
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return tuple(int(source.shape[axis]) for axis in order), tuple(float(lengths[axis]) for axis in order), unit


@contextmanager
def open_source(path: str | Path, **reading) -> Iterator[Source]:
    """Open a volume of any format and check its header.

    Args:
        path, reading: as for [`read_volume`].

    Raises:
        InputError: if it is missing, damaged, or no 3D volume of real numbers.
    """
    if path_is_nifti(path):
        with open_nifti(split(path)[0]) as file:
            yield file
    else:
        with open_volume(path, ReadOptions(**{k: v for k, v in reading.items() if k in _OPTIONS})) as volume:
            yield volume


def read_source(
    source: Source,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    allow_constant: bool = False,
    **options,
) -> NiftiVolume:
    """Read the voxels of an open volume into memory.

    Args:
        source: as [`open_source`] yields it; its voxels can be read once.
        volume, nan_to_zero, ignore_affine, allow_constant: as for [`read_nifti`].
        options: of [`ReadOptions`], which it was opened with.

    Raises:
        InputError, MemoryLimitError: as [`read_volume`].
    """
    if isinstance(source, NiftiFile):
        return read_voxels(
            source, volume=volume, nan_to_zero=nan_to_zero, ignore_affine=ignore_affine, allow_constant=allow_constant
        )
    path, shape = source.path, source.shape
    check_memory(path, shape, source.reading_bytes)
    notes, scaling = list(source.notes), source.scaling
    if may_lose_precision(source.dtype) and not allow_constant:
        ranges, bad = [], False
        for slab in _slabs(shape):
            stored = source.read_planes(*slab)
            ranges.append(stored_range(stored))
            bad = bad or has_non_finite(stored)
        if not (nan_to_zero and bad):  # NaN voxels become 0, which must stay apart from the values
            lows, highs = zip(*ranges, strict=True)
            scaling = without_offset(scaling, (min(lows), max(highs)), source.dtype, notes)
    planes = np.empty(shape[::-1], np.float32)
    overflows = 0
    for start, stop in _slabs(shape):
        stored = source.read_planes(start, stop)
        planes[start:stop] = to_float32(stored, scaling)
        overflows += count_overflows(stored, planes[start:stop])
    check_overflows(path, overflows)
    planes = checked_values(path, planes, nan_to_zero, allow_constant, notes)
    return NiftiVolume(
        np.ascontiguousarray(apply_orientation(planes.T, source.orientation)),
        source.affine @ inv_ornt_aff(source.orientation, shape),
        source.header,
        source.orientation,
        tuple(notes),
        source.files.sha256(),
        source.unit,
        source.anatomical,
        source.results,
    )


@contextmanager
def stream_source(
    source: Source,
    scratch: str | Path,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    **options,
) -> Iterator[SlabScan]:
    """Check the voxels of an open volume in one pass, then read them by regions.

    Args:
        source, volume, nan_to_zero, ignore_affine, options: as for [`read_source`].
        scratch: folder for the voxels of all formats but uncompressed NIfTI, in a file without a name.

    Raises:
        InputError: as [`read_volume`].
        OutputError: if the disk cannot take the voxels.
    """
    if isinstance(source, NiftiFile):
        reading = {"volume": volume, "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}
        with stream_volume(source, scratch, **reading) as scan:
            yield scan
        return
    path, shape = source.path, source.shape
    dtype = source.dtype.newbyteorder("=")
    if dtype.kind == "b" or dtype == np.float16:  # NumPy computes with neither as with numbers of another size
        dtype = np.dtype(np.uint8 if dtype.kind == "b" else np.float32)
    count = int(np.prod(np.array(shape, dtype=object)))
    with scratch_file(scratch, count * dtype.itemsize) as file:
        values = ValueRange(dtype, source.scaling)
        for start, stop in _slabs(shape):
            planes = memoryview(np.ascontiguousarray(source.read_planes(start, stop), dtype)).cast("B")
            with file.writing():
                write_all(file.raw, planes)
            values.add(planes)
        notes = list(source.notes)
        scaling = source.scaling if nan_to_zero and values.bad else values.without_offset(notes)
        check_overflows(path, values.overflows)
        check_finite(path, values.bad, count, nan_to_zero, notes)
        check_contrast(path, float(values.low), float(values.high))
        yield SlabScan(
            path,
            RawGrid(file.raw, shape, dtype, source.orientation),
            source.affine @ inv_ornt_aff(source.orientation, shape),
            source.header,
            scaling,
            values.low,
            values.high,
            tuple(notes),
            source.files.sha256(),
            True,
            source.results,
            source.unit,
            source.anatomical,
        )


def _slabs(shape: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    step = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for start in range(0, shape[2], step):
        yield start, min(start + step, shape[2])

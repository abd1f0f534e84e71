"""Interpretation of stored values: scaling, selection of a volume, NaN handling and contrast check."""

from pathlib import Path

import numpy as np

from diffdiscover3d.errors import InputError


def read_scaling(header, notes: list[str]) -> tuple[float, float] | None:
    """Read slope and intercept; `None` if the stored values are not scaled."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0 or not np.isfinite(inter):
        notes.append(f"slope {slope:g} and intercept {inter:g} are not a valid scaling: values are used as stored")
        return None
    return None if (slope, inter) == (1.0, 0.0) else (slope, inter)


def to_float32(data: np.ndarray, scaling: tuple[float, float] | None) -> np.ndarray:
    """Convert stored values to scaled float32; values outside the range of float32 become infinite."""
    with np.errstate(over="ignore"):
        if scaling:
            # NumPy scalars, so that float32 data are scaled in float64, as in nibabel
            data = data * np.float64(scaling[0]) + np.float64(scaling[1])
        return data.astype(np.float32)


def may_lose_precision(dtype: np.dtype) -> bool:
    """Whether float32 cannot hold all values of a data type."""
    return dtype.itemsize > (4 if dtype.kind == "f" else 2)


def has_non_finite(stored: np.ndarray) -> bool:
    """Whether there are NaN or infinite values."""
    return stored.dtype.kind == "f" and not np.isfinite(stored).all()


def count_overflows(stored: np.ndarray, values: np.ndarray) -> int:
    """The number of finite stored values that [`to_float32`] made infinite."""
    infinite = np.isinf(values)
    if infinite.any() and stored.dtype.kind == "f":
        infinite &= np.isfinite(stored)
    return int(np.count_nonzero(infinite))


def check_overflows(path: Path, count: int) -> None:
    """Raise if values exceed the range of float32.

    Raises:
        InputError: if there are such values.
    """
    if count:
        raise InputError(f"{path}: {count:,} voxels exceed the range of 32-bit numbers, 3.4e38; rescale the scan.")


def stored_range(values: np.ndarray) -> tuple[float, float]:
    """Minimum and maximum of the finite values, in float64; (inf, -inf) if there are none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (np.inf, -np.inf)


def without_offset(
    scaling: tuple[float, float] | None, stored: tuple[float, float], dtype: np.dtype, notes: list[str]
) -> tuple[float, float] | None:
    """The scaling, with the lowest value subtracted if float32 could not tell the values apart otherwise.

    Args:
        scaling: slope and intercept of the stored values, `None` for 1 and 0.
        stored: [`stored_range`] of the whole volume.
        dtype: of the stored values.
        notes: list to which a note is appended if the lowest value is subtracted.
    """
    slope, inter = scaling or (1.0, 0.0)
    low, high = sorted(value * slope + inter for value in stored)
    largest = max(abs(low), abs(high))
    exact = scaling is None and dtype.kind in "iu" and largest < 2**24
    if not may_lose_precision(dtype) or exact or not 0 < high - low < np.inf or largest < (high - low) * 2**12:
        return scaling
    notes.append(f"the lowest value, {low:.10g}, was subtracted from all: 32-bit numbers cannot hold such an offset")
    return slope, inter - low


def pick_volume(path: Path, shape: tuple[int, ...], volume: int | None, notes: list[str]) -> int:
    """Determine the index of the volume to read from a file of this shape.

    Raises:
        InputError: if the file has several volumes and `volume` is `None`, or `volume` is out of range.
    """
    count = int(np.prod(shape[3:])) if len(shape) > 3 else 1
    if volume is not None and not 0 <= volume < count:
        raise InputError(f"{path}: has {count} volume(s), numbered from 0; there is no volume {volume}.")
    if count > 1 and volume is None:
        raise InputError(f"{path}: contains {count} volumes (shape {shape}); select one with --volume N, from 0.")
    if len(shape) > 3:
        notes.append(f"volume {volume or 0} of {count} in a {len(shape)}-D file")
    return volume or 0


def check_finite(path: Path, bad: int, size: int, nan_to_zero: bool, notes: list[str]) -> None:
    """Raise for NaN and Inf voxels, or add a note that they were set to 0.

    Raises:
        InputError: if there are NaN or Inf voxels and `nan_to_zero` is not set.
    """
    if bad and not nan_to_zero:
        raise InputError(f"{path}: {bad:,} of {size:,} voxels are NaN or Inf; use --nan-to-zero to set them to 0.")
    if bad:
        notes.append(f"{bad:,} NaN or Inf voxels were set to 0")


def check_contrast(path: Path, low: float, high: float, allow_constant: bool = False) -> None:
    """Check that the value range allows min-max normalisation.

    Raises:
        InputError: if minimum and maximum are equal, or their difference exceeds the range of float32.
    """
    if high - low > float(np.finfo(np.float32).max):
        raise InputError(f"{path}: its value range, {low:g} to {high:g}, is too large; rescale the scan.")
    if low == high and not allow_constant:
        raise InputError(f"{path}: no contrast, all voxels are {low:g}; give a scan with contrast.")


def checked_values(
    path: Path, values: np.ndarray, nan_to_zero: bool, allow_constant: bool, notes: list[str]
) -> np.ndarray:
    """Check the values of a whole volume and return them with NaN and Inf replaced by 0, if that is allowed.

    Args:
        path: named in errors.
        values: float32, any shape.
        nan_to_zero, allow_constant: as for [`read_nifti`].
        notes: extended by what was replaced.

    Raises:
        InputError: as [`check_finite`] and [`check_contrast`].
    """
    finite = np.isfinite(values)
    bad = values.size - int(np.count_nonzero(finite))
    check_finite(path, bad, values.size, nan_to_zero, notes)
    if bad:
        values = np.where(finite, values, np.float32(0))
    check_contrast(path, float(values.min()), float(values.max()), allow_constant)
    return values

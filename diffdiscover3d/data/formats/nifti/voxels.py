"""What stored numbers mean: scaling, which volume of several, what becomes of NaN, whether there is contrast."""

from pathlib import Path

import numpy as np

from diffdiscover3d.errors import InputError


def read_scaling(header, notes: list[str]) -> tuple[float, float] | None:
    """Slope and intercept of the stored numbers; `None` where they are values as they stand."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0 or not np.isfinite(inter):
        notes.append(f"slope {slope:g} and intercept {inter:g} are no scaling: values are taken as stored")
        return None
    return None if (slope, inter) == (1.0, 0.0) else (slope, inter)


def to_float32(data: np.ndarray, scaling: tuple[float, float] | None) -> np.ndarray:
    """The values of stored numbers; those beyond float32 become infinite."""
    with np.errstate(over="ignore"):
        if scaling:
            # NumPy scalars, not Python ones: float32 data is then scaled in float64 too, as nibabel does
            data = data * np.float64(scaling[0]) + np.float64(scaling[1])
        return data.astype(np.float32)


def pick_volume(path: Path, shape: tuple[int, ...], volume: int | None, notes: list[str]) -> int:
    """The number of the volume to take from a file of this shape.

    Raises:
        InputError: if there are several and none was chosen, or there is no such volume.
    """
    count = int(np.prod(shape[3:])) if len(shape) > 3 else 1
    if volume is not None and not 0 <= volume < count:
        raise InputError(f"{path}: has {count} volume(s), numbered from 0; there is no volume {volume}.")
    if count > 1 and volume is None:
        raise InputError(f"{path}: holds {count} volumes (shape {shape}); choose one with --volume N, from 0.")
    if len(shape) > 3:
        notes.append(f"volume {volume or 0} of {count} in a {len(shape)}-D file")
    return volume or 0


def check_finite(path: Path, bad: int, size: int, nan_to_zero: bool, notes: list[str]) -> None:
    """Refuse NaN and Inf voxels, or note that they were set to 0.

    Raises:
        InputError: if there are any and `nan_to_zero` is not set.
    """
    if bad and not nan_to_zero:
        raise InputError(f"{path}: {bad:,} of {size:,} voxels are NaN or Inf; --nan-to-zero goes on.")
    if bad:
        notes.append(f"{bad:,} NaN or Inf voxels were set to 0")


def check_contrast(path: Path, low: float, high: float, allow_constant: bool = False) -> None:
    """Refuse values that min-max normalising would divide by 0 or by infinity.

    Raises:
        InputError: if the smallest and the largest value are equal, or further apart than float32 can tell.
    """
    if high - low > float(np.finfo(np.float32).max):
        raise InputError(f"{path}: its values, {low:g} to {high:g}, are too far apart; rescale it.")
    if low == high and not allow_constant:
        raise InputError(f"{path}: no contrast, all voxels are {low:g}; give a scan with structure in it.")

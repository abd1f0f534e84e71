"""What the formats that `nibabel` reads share: MGH, MINC and Analyze."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile, damage_reported, pick
from diffdiscover3d.errors import InputError


@contextlib.contextmanager
def open_image(
    path: Path,
    name: str,
    options: ReadOptions,
    kind: type,
    what: str,
    frame_axes: Callable[[nib.spatialimages.SpatialImage], tuple[int, ...]] = lambda image: tuple(range(3, image.ndim)),
) -> Iterator[VolumeFile]:
    """Open a file as an image class of nibabel; label maps are NIfTI on its grid.

    Args:
        kind: the class.
        what: the format, for messages.
        frame_axes: the axes of an image that are not of space, by default all behind the third.

    Raises:
        InputError: if it is damaged, or holds several volumes and none was chosen.
    """
    with damage_reported(name, f"is no {what} file, or a damaged one"):
        image = kind.from_filename(str(path))
        affine = np.asarray(image.affine, dtype=float)
        shape, dtype = tuple(map(int, image.shape)), np.dtype(image.get_data_dtype())
        others = frame_axes(image)
    space = [axis for axis in range(len(shape)) if axis not in others]
    shape = tuple(shape[axis] for axis in (*space, *others))
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"{name}: not a 3D volume but of shape {shape}; give one of at least two slices.")
    if dtype.fields or dtype.kind == "c":
        raise InputError(f"{name}: holds {'RGB' if dtype.fields else 'complex'} voxels; convert it to one real number.")
    notes: list[str] = []
    number = pick(name, shape, options.volume, notes)
    place = dict(zip(others, np.unravel_index(number, shape[3:], order="F"), strict=True)) if others else {}
    scaled = np.dtype(np.float64) if _is_scaled(image) else dtype

    def read(start: int, stop: int) -> np.ndarray:
        wanted = {axis: int(frame) for axis, frame in place.items()} | {space[2]: slice(start, stop)}
        return np.asarray(image.dataobj[tuple(wanted.get(axis, slice(None)) for axis in range(len(shape)))]).T

    yield VolumeFile(name, shape[:3], scaled, affine, read, notes=notes)


def _is_scaled(image: nib.spatialimages.SpatialImage) -> bool:
    proxy = image.dataobj
    if isinstance(image, nib.Minc1Image):
        return True
    return (getattr(proxy, "slope", 1), getattr(proxy, "inter", 0)) not in ((1, 0), (None, None))

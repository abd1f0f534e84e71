"""What the formats that `nibabel` reads share: MGH, MINC and Analyze."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile, damage_reported, pick
from diffdiscover3d.errors import InputError


@contextlib.contextmanager
def open_image(path: Path, name: str, options: ReadOptions, kind: type, what: str) -> Iterator[VolumeFile]:
    """Open a file as an image class of nibabel; label maps are NIfTI on its grid.

    Args:
        kind: the class.
        what: the format, for messages.

    Raises:
        InputError: if it is damaged, or holds several volumes and none was chosen.
    """
    with damage_reported(name, f"is no {what} file, or a damaged one"):
        image = kind.from_filename(str(path))
        affine = np.asarray(image.affine, dtype=float)
        shape, dtype = tuple(map(int, image.shape)), np.dtype(image.get_data_dtype())
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise InputError(f"{name}: not a 3D volume but of shape {shape}; give one of at least two slices.")
    if dtype.fields or dtype.kind == "c":
        raise InputError(f"{name}: holds {'RGB' if dtype.fields else 'complex'} voxels; convert it to one real number.")
    notes: list[str] = []
    number = pick(name, shape, options.volume, notes)
    place = tuple(int(i) for i in np.unravel_index(number, shape[3:], order="F")) if len(shape) > 3 else ()
    scaled = np.dtype(np.float64) if _is_scaled(image) else dtype

    def read(start: int, stop: int) -> np.ndarray:
        return np.asarray(image.dataobj[(slice(None), slice(None), slice(start, stop), *place)]).T

    yield VolumeFile(name, shape[:3], scaled, affine, read, notes=notes)


def _is_scaled(image: nib.spatialimages.SpatialImage) -> bool:
    proxy = image.dataobj
    if isinstance(image, nib.Minc1Image):
        return True
    return (getattr(proxy, "slope", 1), getattr(proxy, "inter", 0)) not in ((1, 0), (None, None))

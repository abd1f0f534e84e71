"""NRRD and MetaImage (MHA, MHD), by `SimpleITK`. Label maps are NIfTI with the same place in space."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.volume_file import ReadOptions, VolumeFile, damage_reported, need, one_line, pick
from diffdiscover3d.errors import InputError

NAME = "NRRD or MetaImage"
EXTRA = "medical"
SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@contextlib.contextmanager
def open_file(path: Path, name: str, options: ReadOptions) -> Iterator[VolumeFile]:
    """Open a volume, or one component or time point of several by `options.volume`.

    Raises:
        InputError: if it is damaged.
    """
    sitk = need("SimpleITK", EXTRA, name)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with damage_reported(name, "is no NRRD or MetaImage file, or a damaged one"):
        reader.ReadImageInformation()
    dimension, components = reader.GetDimension(), reader.GetNumberOfComponents()
    size = reader.GetSize()
    if dimension not in (3, 4):
        raise InputError(f"{name}: not a 3D volume but of shape {size}; give one of at least two slices.")
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise InputError(f"{name}: holds complex voxels; convert it to one real number a voxel.")
    count = components * (size[3] if dimension == 4 else 1)
    notes: list[str] = []
    number = pick(name, (*size[:3], count) if count > 1 or dimension == 4 else size[:3], options.volume, notes)
    affine = lps_affine(reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection(), dimension)
    whole: list[np.ndarray] = []

    def read(start: int, stop: int) -> np.ndarray:
        if not whole:
            try:
                array = sitk.GetArrayFromImage(reader.Execute())
            except RuntimeError as error:
                raise InputError(f"{name}: is truncated or damaged ({one_line(error)}); copy it again.") from error
            array = array[..., number % components] if components > 1 else array
            whole.append(np.array(array[number // components] if dimension == 4 else array))
        return whole[0][start:stop]

    dtype = _DTYPES.get(sitk.GetPixelIDValueAsString(reader.GetPixelID()).split("of ")[-1])
    if dtype is None:
        raise InputError(f"{name}: holds {sitk.GetPixelIDValueAsString(reader.GetPixelID())} voxels.")
    yield VolumeFile(name, size[:3], dtype, affine, read, notes=notes)


_DTYPES = {
    f"{bits}-bit {kind}": np.dtype(f"{code}{bits // 8}")
    for kind, code in (("signed integer", "i"), ("unsigned integer", "u"), ("float", "f"))
    for bits in (8, 16, 32, 64)
    if code != "f" or bits >= 32
}


def lps_affine(spacing, origin, direction, dimension: int = 3) -> np.ndarray:
    """The (4, 4) affine to right, anterior, superior in mm of an ITK image's geometry, which is left, posterior."""
    affine = np.eye(4)
    matrix = np.asarray(direction, dtype=float).reshape(dimension, dimension)[:3, :3]
    affine[:3, :3] = matrix * np.asarray(spacing[:3])
    affine[:3, 3] = origin[:3]
    return LPS_TO_RAS @ affine

"""Segment what is in memory already: arrays, nibabel images, SimpleITK images. Nothing is written."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.nifti.voxels import check_contrast, check_finite
from diffdiscover3d.data.formats.sitk import lps_affine
from diffdiscover3d.data.formats.units import UNKNOWN
from diffdiscover3d.data.formats.volume_file import check_grid, nifti_header

NAME = Path("the volume")  # for messages
_CANONICAL = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)


def is_in_memory(volume) -> bool:
    """Whether an input is a volume itself rather than the path of one or a sequence of paths."""
    if isinstance(volume, np.ndarray | nib.spatialimages.SpatialImage | NiftiVolume):
        return True
    return type(volume).__module__.split(".")[0] in ("torch", "SimpleITK")


def as_scan(volume, *, nan_to_zero: bool = False) -> tuple[NiftiVolume, Callable[[np.ndarray], object]]:
    """Bring a volume in memory to canonical orientation.

    Args:
        volume: an (H, W, D) array or tensor in canonical orientation, a nibabel image, or a SimpleITK image.
        nan_to_zero: replace NaN and Inf by 0.

    Returns:
        The scan, and a function that turns an (H, W, D) label map on its grid into what the input is: an array, or an
        image of the same kind, grid and place in space.

    Raises:
        InputError: if it is no 3D volume of real numbers, or has no contrast.
    """
    if isinstance(volume, NiftiVolume):
        return volume, volume.to_input_grid
    if isinstance(volume, nib.spatialimages.SpatialImage):
        array, affine = np.asarray(volume.dataobj), np.asarray(volume.affine, float)
        array = array.reshape(array.shape[:3]) if array.size == np.prod(array.shape[:3]) else array
        unit, back = "mm", lambda labels: _nibabel_image(volume, labels)
    elif type(volume).__module__.split(".")[0] == "SimpleITK":
        import SimpleITK as sitk

        array = sitk.GetArrayFromImage(volume).T
        geometry = volume.GetSpacing(), volume.GetOrigin(), volume.GetDirection()
        affine = lps_affine(*geometry, volume.GetDimension()) if volume.GetDimension() == 3 else np.eye(4)
        unit, back = "mm", lambda labels: _sitk_image(volume, labels)
    else:
        array = np.asarray(volume.cpu() if hasattr(volume, "cpu") else volume)
        affine, unit, back = np.eye(4), UNKNOWN, np.ascontiguousarray
    check_grid(str(NAME), array.shape, array.dtype)
    orientation = io_orientation(affine)
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(apply_orientation(array, orientation), dtype=np.float32)
    notes: list[str] = []
    bad = data.size - int(np.count_nonzero(np.isfinite(data)))
    check_finite(NAME, bad, data.size, nan_to_zero, notes)
    if bad:
        data = np.where(np.isfinite(data), data, np.float32(0))
    check_contrast(NAME, float(data.min()), float(data.max()))
    header = nifti_header(affine, array.shape)
    canonical = affine @ inv_ornt_aff(orientation, array.shape)
    scan = NiftiVolume(data, canonical, header, orientation, tuple(notes), None, unit, unit != UNKNOWN)
    return scan, lambda labels: back(scan.to_input_grid(labels))


def _nibabel_image(like: nib.spatialimages.SpatialImage, labels: np.ndarray) -> nib.spatialimages.SpatialImage:
    kind = type(like) if isinstance(like, nib.Nifti1Image) else nib.Nifti1Image
    header = like.header.copy() if isinstance(like, nib.Nifti1Image) else None
    image = kind(labels, like.affine, header)
    image.set_data_dtype(labels.dtype)
    image.header.set_slope_inter(1, 0)
    image.header.set_intent("label", name="parts")
    return image


def _sitk_image(like, labels: np.ndarray):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(labels.T))
    image.CopyInformation(like)
    return image

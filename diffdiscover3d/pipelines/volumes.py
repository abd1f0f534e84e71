"""What the pipelines take and return: volumes in many forms, tensors, arrays or NIfTI images."""

import os
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch

from diffdiscover3d.data.formats.nifti.header import length_unit
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, as_volume_tensor
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.units import IN_MM

OUTPUT_TYPES = ("pt", "np", "nifti")


def check_output_type(output_type: str) -> None:
    """Refuse an unknown output type.

    Raises:
        ValueError: if it is none of `OUTPUT_TYPES`.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")


def read_volumes(volume) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Read one volume, a batch, or a list of volumes.

    Args:
        volume: a path of any format or an image (reoriented to RAS+), an array or tensor of shape (H, W, D),
            (B, H, W, D) or (B, 1, H, W, D), or a list of these, of equal or different shapes.

    Returns:
        The volumes, each (1, 1, H, W, D) float32, and the (4, 4) affine of each in mm; the identity for arrays.

    Raises:
        InputError: if a volume cannot be read.
        ValueError: if a list is empty.
    """
    if isinstance(volume, list | tuple) and not all(isinstance(v, list | tuple | int | float) for v in volume):
        pairs = [read_volumes(one) for one in volume]
        return [v for volumes, _ in pairs for v in volumes], [a for _, affines in pairs for a in affines]
    if isinstance(volume, list | tuple):
        if not volume:
            raise ValueError("`volume` is an empty list; give at least one volume.")
        volume = np.asarray(volume, dtype=np.float32)
    if isinstance(volume, str | os.PathLike):
        volume = read_volume(volume)
    image, affine = getattr(volume, "nifti_image", volume), np.eye(4)  # of the datasets library
    if isinstance(image, NiftiVolume):
        affine = image.affine
    elif isinstance(image, nib.spatialimages.SpatialImage) and image.affine is not None:
        affine = nib.as_closest_canonical(image).affine
        if isinstance(image, nib.Nifti1Image):
            affine = np.diag([*[IN_MM[length_unit(image.header)]] * 3, 1.0]) @ affine
    volumes = as_volume_tensor(volume)
    return [v[None] for v in volumes], [affine] * len(volumes)


def convert(tensor: torch.Tensor, output_type: str, affines: Sequence[np.ndarray]):
    """Convert (B, C, h, w, d) to the output type.

    Returns:
        The tensor; a NumPy array of the same shape; or B images, (h, w, d) or (h, w, d, C) float32 with RAS+ affines.
    """
    if output_type == "pt":
        return tensor
    array = tensor.float().cpu().numpy()
    if output_type == "np":
        return array
    return [_image(np.moveaxis(one, 0, -1), affine) for one, affine in zip(array, affines, strict=True)]


def feature_affine(affine: np.ndarray, grid: Sequence[int], extent: Sequence[int]) -> np.ndarray:
    """The affine of features on `grid` that span `extent` voxels of a scan, corner centres on corner centres.

    Args:
        affine: (4, 4) of the scan.
        grid: (h, w, d) of the features.
        extent: voxels of the scan that the features span, see [`DiffusionFeatureOutput`].
    """
    scale = [(e - 1) / (n - 1) if n > 1 else float(e) for e, n in zip(extent, grid, strict=True)]
    return affine @ np.diag([*scale, 1.0])


def _image(array: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array[..., 0] if array.shape[-1] == 1 else array, affine)
    image.header.set_xyzt_units("mm")
    return image

"""Read NIfTI volumes into canonical orientation, and write results back on the input's own grid."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from diffdiscover3d.data.formats.nifti.header import check_fits, check_shape, check_size, read_affine, read_header
from diffdiscover3d.data.formats.nifti.output import nifti_stream, output_header
from diffdiscover3d.data.formats.nifti.payload import read_payload
from diffdiscover3d.data.formats.nifti.voxels import check_contrast, check_finite, pick_volume, read_scaling, to_float32
from diffdiscover3d.errors import InputError

if TYPE_CHECKING:
    import torch

_CANONICAL = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)


@dataclass(frozen=True)
class NiftiVolume:
    """A volume in canonical (RAS+) orientation that remembers the grid it came from.

    Attributes:
        data: (H, W, D) float32 intensities, finite, along right, anterior, superior.
        affine: (4, 4) from voxels of `data` to millimetres.
        header: the file's header, unchanged.
        orientation: of the file's axes, as `nibabel.orientations.io_orientation` gives it.
        notes: what was unusual about the file, in words for the user.
    """

    data: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header
    orientation: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel of `data`, in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def to_input_grid(self, array: np.ndarray) -> np.ndarray:
        """Turn an (H, W, D, ...) array on the grid of `data` into the file's own axis order and directions."""
        return apply_orientation(array, ornt_transform(_CANONICAL, self.orientation))


def read_nifti(
    path: str | Path,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    allow_constant: bool = False,
) -> NiftiVolume:
    """Read a `.nii` or `.nii.gz` file whole, after checking its header.

    Args:
        path: the file (NIfTI-1 or NIfTI-2, any data type of real numbers, either byte order).
        volume: which volume of a 4-D or 5-D file, from 0; a single one needs no choice.
        nan_to_zero: put 0 for NaN and Inf instead of refusing them.
        ignore_affine: go on with the voxel grid alone where the affine is unusable.
        allow_constant: take a volume without contrast too, such as a mask that marks nothing.

    Raises:
        InputError: if the file is missing, damaged, not a 3D volume of real numbers, or has no contrast.
        MemoryLimitError: if the volume is larger than this machine's memory.
    """
    path = Path(path)
    notes: list[str] = []
    header = read_header(path)
    shape = check_shape(path, header)
    check_size(path, header, shape)
    check_fits(path, header, shape)
    affine = read_affine(path, header, ignore_affine, notes)
    scaling = read_scaling(header, notes)
    data = _read_data(path, header, notes)
    data = to_float32(data[..., pick_volume(path, shape, volume, notes)], scaling)
    finite = np.isfinite(data)
    bad = data.size - int(np.count_nonzero(finite))
    check_finite(path, bad, data.size, nan_to_zero, notes)
    if bad:
        data = np.where(finite, data, np.float32(0))
    check_contrast(path, float(data.min()), float(data.max()), allow_constant)

    orientation = io_orientation(affine)
    canonical_affine = affine @ inv_ornt_aff(orientation, data.shape)
    data = np.ascontiguousarray(apply_orientation(data, orientation))
    return NiftiVolume(data, canonical_affine, header, orientation, tuple(notes))


def write_like(path: str | Path, array: np.ndarray, like: NiftiVolume, *, labels: bool = False) -> None:
    """Write an array lying on the grid of `like.data` as NIfTI, on the grid, affine and codes of its file.

    Args:
        path: target ending in `.nii` or `.nii.gz`; written atomically, the same bytes every time.
        array: (H, W, D) or (H, W, D, C).
        labels: mark it as a label map (intent LABEL).

    Raises:
        OutputError: if it cannot be written.
    """
    array = like.to_input_grid(array)
    with nifti_stream(path, output_header(like.header, array.dtype, array.shape, labels)) as write:
        for plane in np.moveaxis(array, -1, 0):
            write(plane)


def write_volume(
    path: str | Path, array: np.ndarray, affine: np.ndarray | None = None, *, labels: bool = False
) -> None:
    """Write a new (H, W, D) volume or label map with the given affine (default: 1 mm, RAS)."""
    affine = np.eye(4) if affine is None else affine
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
    header.set_xyzt_units("mm")
    write_like(path, array, NiftiVolume(array, affine, header, io_orientation(affine)), labels=labels)


def as_volume_tensor(volume) -> "torch.Tensor":
    """Bring whatever a user has to a (B, 1, H, W, D) float32 tensor of raw intensities.

    Args:
        volume: a path or nibabel image (brought to canonical orientation), a [`NiftiVolume`], or an array or tensor
            of shape (H, W, D), (B, H, W, D) or (B, 1, H, W, D).

    Raises:
        InputError: if the file cannot be read, or the array is not of such a shape.
    """
    import torch  # here, because a bad file is refused before torch is imported

    if isinstance(volume, str | os.PathLike):
        volume = read_nifti(volume)
    volume = getattr(volume, "nifti_image", volume)  # the datasets library's wrapper cannot be reoriented itself
    if isinstance(volume, nib.spatialimages.SpatialImage):
        if volume.get_data_dtype().kind == "c":  # asking nibabel for float32 would drop the imaginary part
            raise InputError("the image must hold real numbers, got complex ones; take their magnitude.")
        image = nib.as_closest_canonical(volume)
        volume = np.asarray(image.dataobj, dtype=np.float32)
        volume = (
            volume.reshape(volume.shape[:3]) if volume.ndim > 3 and volume.size == np.prod(volume.shape[:3]) else volume
        )
        if volume.ndim != 3:
            raise InputError(
                f"the image must hold one 3D volume, got shape {volume.shape}; pick one, as image.slicer[..., 0]."
            )
    if isinstance(volume, NiftiVolume):
        volume = volume.data
    if isinstance(volume, np.ndarray):  # torch takes neither negative strides nor the other byte order
        volume = np.ascontiguousarray(volume, dtype=volume.dtype.newbyteorder("="))
    tensor = torch.as_tensor(volume)
    if tensor.is_complex():
        raise InputError("the volume must hold real numbers, got complex ones; take their magnitude.")
    if tensor.ndim == 3:
        tensor = tensor[None, None]
    elif tensor.ndim == 4:
        tensor = tensor[:, None]
    if tensor.ndim != 5 or tensor.shape[1] != 1 or 0 in tensor.shape:
        raise InputError(
            f"a volume must be (H, W, D), (B, H, W, D) or (B, 1, H, W, D), got shape {tuple(tensor.shape)}."
        )
    return tensor.float()


def _read_data(path: Path, header, notes: list[str]) -> np.ndarray:
    """The stored numbers, whole."""
    dtype, shape, offset = header.get_data_dtype(), header.get_data_shape(), int(header["vox_offset"])
    payload = read_payload(path, offset, int(np.prod(shape)) * dtype.itemsize, notes)
    return np.frombuffer(payload, dtype=dtype).reshape(*shape[:3], -1, order="F")

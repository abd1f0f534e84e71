"""Reading of NIfTI volumes in canonical orientation, and writing of results on the grid of the input."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from diffdiscover3d.data.formats.nifti.header import check_fits, length_unit, read_affine
from diffdiscover3d.data.formats.nifti.output import nifti_stream, output_header
from diffdiscover3d.data.formats.nifti.source import NiftiFile, open_nifti
from diffdiscover3d.data.formats.nifti.voxels import (
    check_overflows,
    checked_values,
    count_overflows,
    has_non_finite,
    may_lose_precision,
    pick_volume,
    read_scaling,
    stored_range,
    to_float32,
    without_offset,
)
from diffdiscover3d.data.formats.volume_file import NiftiGrid, ResultGrid
from diffdiscover3d.errors import InputError

if TYPE_CHECKING:
    import torch

_CANONICAL = np.array([[0, 1], [1, 1], [2, 1]], dtype=float)


@dataclass(frozen=True)
class NiftiVolume:
    """A volume of any format in canonical (RAS+) orientation, with the grid of its file.

    Attributes:
        data: (H, W, D) finite float32 intensities in RAS+ orientation.
        affine: (4, 4) affine from voxels of `data` to millimetres.
        header: the unmodified header of the file.
        orientation: orientation of the axes of the file, from `nibabel.orientations.io_orientation`.
        notes: warnings about the file for the user.
        sha256: hash of the file, computed while reading; `None` if the volume was not read from a file.
        unit, anatomical, results: as of [`VolumeFile`].
    """

    data: np.ndarray
    affine: np.ndarray
    header: nib.Nifti1Header
    orientation: np.ndarray
    notes: tuple[str, ...] = ()
    sha256: str | None = None
    unit: str = "mm"
    anatomical: bool = True
    results: ResultGrid | None = None

    def __post_init__(self):
        if self.results is None:
            object.__setattr__(self, "results", NiftiGrid(self.header))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, D) of `data`."""
        return self.data.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size of `data` in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))

    def to_input_grid(self, array: np.ndarray) -> np.ndarray:
        """Convert an (H, W, D, ...) array on the grid of `data` to the axis order and directions of the file."""
        return apply_orientation(array, ornt_transform(_CANONICAL, self.orientation))


def read_nifti(
    path: str | Path,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    allow_constant: bool = False,
) -> NiftiVolume:
    """Validate the header of a `.nii` or `.nii.gz` file and read the volume.

    Args:
        path: path of the file (NIfTI-1 or NIfTI-2, any real data type, either byte order).
        volume: index of the volume in a 4-D or 5-D file, from 0; not required for a single volume.
        nan_to_zero: replace NaN and Inf by 0 instead of raising.
        ignore_affine: use the voxel grid alone if the affine is unusable, instead of raising.
        allow_constant: accept a volume without contrast, such as an empty mask; no offset is subtracted.

    Raises:
        InputError: if the file is missing, damaged, not a 3D volume of real numbers, or has no contrast.
        MemoryLimitError: if the volume does not fit into the memory of this machine.
    """
    with open_nifti(path) as file:
        return read_voxels(
            file, volume=volume, nan_to_zero=nan_to_zero, ignore_affine=ignore_affine, allow_constant=allow_constant
        )


def read_voxels(
    file: NiftiFile,
    *,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    allow_constant: bool = False,
) -> NiftiVolume:
    """Read the voxels of an open file into memory.

    Args:
        file: file from [`open_nifti`]; its voxels can be read only once.
        volume, nan_to_zero, ignore_affine, allow_constant: as for [`read_nifti`].

    Raises:
        InputError, MemoryLimitError: as for [`read_nifti`].
    """
    path, header, shape = file.path, file.header, file.shape
    notes: list[str] = []
    check_fits(path, header, shape)
    affine = read_affine(path, header, ignore_affine, notes)
    scaling = read_scaling(header, notes)
    dtype, offset = header.get_data_dtype(), int(header["vox_offset"])
    payload = file.payload.read(offset, int(np.prod(shape)) * dtype.itemsize, notes)
    sha256 = file.payload.sha256()
    stored = np.frombuffer(payload, dtype=dtype).reshape(*shape[:3], -1, order="F")
    stored = stored[..., pick_volume(path, shape, volume, notes)]
    # NaN voxels become 0, which must stay apart from the values
    if may_lose_precision(dtype) and not allow_constant and not (nan_to_zero and has_non_finite(stored)):
        scaling = without_offset(scaling, stored_range(stored), dtype, notes)
    values = to_float32(stored, scaling)
    check_overflows(path, count_overflows(stored, values))
    data = checked_values(path, values, nan_to_zero, allow_constant, notes)

    orientation = io_orientation(affine)
    canonical_affine = affine @ inv_ornt_aff(orientation, data.shape)
    data = np.ascontiguousarray(apply_orientation(data, orientation))
    return NiftiVolume(data, canonical_affine, header, orientation, tuple(notes), sha256, length_unit(header))


def write_like(path: str | Path, array: np.ndarray, like: NiftiVolume, *, labels: bool = False) -> None:
    """Write an array on the grid of `like.data` as NIfTI, with the grid, affine and codes of the file of `like`.

    Args:
        path: target path ending in `.nii` or `.nii.gz`; written atomically, with reproducible bytes.
        array: (H, W, D) or (H, W, D, C).
        like: volume that defines the grid.
        labels: mark the file as a label map (intent LABEL).

    Raises:
        OutputError: if the file cannot be written.
    """
    array = like.to_input_grid(array)
    with nifti_stream(path, output_header(like.header, array.dtype, array.shape, labels)) as write:
        for plane in np.moveaxis(array, -1, 0):
            write(plane)


def write_volume(
    path: str | Path, array: np.ndarray, affine: np.ndarray | None = None, *, labels: bool = False
) -> None:
    """Write an (H, W, D) volume or label map with the given affine (default: 1 mm, RAS+)."""
    affine = np.eye(4) if affine is None else affine
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
    header.set_xyzt_units("mm")
    write_like(path, array, NiftiVolume(array, affine, header, io_orientation(affine)), labels=labels)


def as_volume_tensor(volume) -> "torch.Tensor":
    """Convert a file, image or array to a (B, 1, H, W, D) float32 tensor of raw intensities.

    Args:
        volume: a path or nibabel image (reoriented to RAS+), a [`NiftiVolume`], or an array or tensor of shape
            (H, W, D), (B, H, W, D) or (B, 1, H, W, D).

    Raises:
        InputError: if the file cannot be read, or the shape or data type is not supported.
    """
    import torch  # lazy, so that invalid files are reported before the slow import

    if isinstance(volume, str | os.PathLike):
        volume = read_nifti(volume)
    volume = getattr(volume, "nifti_image", volume)  # unwrap images of the datasets library
    if isinstance(volume, nib.spatialimages.SpatialImage):
        if volume.get_data_dtype().kind == "c":  # converting to float32 would discard the imaginary part
            raise InputError("the image must have real values, got complex values; use their magnitude.")
        image = nib.as_closest_canonical(volume)
        volume = np.asarray(image.dataobj, dtype=np.float32)
        volume = (
            volume.reshape(volume.shape[:3]) if volume.ndim > 3 and volume.size == np.prod(volume.shape[:3]) else volume
        )
        if volume.ndim != 3:
            raise InputError(
                f"the image must contain one 3D volume, got shape {volume.shape}; select one, as image.slicer[..., 0]."
            )
    if isinstance(volume, NiftiVolume):
        volume = volume.data
    if isinstance(volume, np.ndarray):  # torch supports neither negative strides nor non-native byte orders
        volume = np.ascontiguousarray(volume, dtype=volume.dtype.newbyteorder("="))
    tensor = torch.as_tensor(volume)
    if tensor.is_complex():
        raise InputError("the volume must have real values, got complex values; use their magnitude.")
    if tensor.ndim == 3:
        tensor = tensor[None, None]
    elif tensor.ndim == 4:
        tensor = tensor[:, None]
    if tensor.ndim != 5 or tensor.shape[1] != 1 or 0 in tensor.shape:
        raise InputError(
            f"a volume must be (H, W, D), (B, H, W, D) or (B, 1, H, W, D), got shape {tuple(tensor.shape)}."
        )
    return tensor.float()

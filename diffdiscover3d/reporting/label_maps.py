"""Read label maps from disk and compare them with their scan."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.errors import InputError

_LEVEL = re.compile(r"_level-(\d+)_dseg\.nii(\.gz)?$")


@dataclass(frozen=True)
class LabelMap:
    """A label map on the canonical grid of its scan.

    Attributes:
        level: its level in the hierarchy, `None` if its name holds none.
        labels: (H, W, D) part numbers.
        num_parts: K.
        provenance: the contents of its sidecar, empty if it has none.
    """

    level: int | None
    labels: np.ndarray
    num_parts: int
    provenance: dict


def read_label_map(path: str | Path, scan: NiftiVolume) -> LabelMap:
    """Read a label map on the grid of a scan.

    Raises:
        InputError: if it cannot be read, or has another shape or affine than the scan.
    """
    path = Path(path)
    try:
        image = nib.load(path)
        array = np.asarray(image.dataobj)
    except Exception as error:  # nibabel, gzip and zlib raise many kinds
        raise InputError(f"{path}: cannot be read as a label map ({str(error).splitlines()[0]}).") from error
    on_disk = tuple(scan.header.get_data_shape()[:3])
    if array.shape != on_disk:
        raise InputError(f"{path}: has shape {array.shape}, its scan {on_disk}; give the label map of this scan.")
    if not _is_aligned(image, scan):
        raise InputError(f"{path}: is not aligned with its scan (the affines differ); give the label map of this scan.")
    if array.min() < 0 or (array != np.round(array)).any():
        raise InputError(f"{path}: part numbers must be integers from 0; give a label map.")
    sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    try:
        provenance = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        provenance = {}
    labels = apply_orientation(array, scan.orientation).astype(np.uint16)
    level = _LEVEL.search(path.name)
    count = max(int(labels.max()) + 1, len(provenance.get("parts", ())))
    return LabelMap(int(level.group(1)) if level else None, labels, count, provenance)


def _is_aligned(image: nib.spatialimages.SpatialImage, scan: NiftiVolume) -> bool:
    fields = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim", "quatern_b", "quatern_c", "quatern_d")
    if all(f in image.header and np.array_equal(image.header[f], scan.header[f], equal_nan=True) for f in fields):
        return True  # also if the affine is unusable
    canonical = image.affine @ inv_ornt_aff(scan.orientation, image.shape)
    return np.allclose(canonical, scan.affine, atol=1e-2)

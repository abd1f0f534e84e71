"""Read label maps from disk and compare them with their scan."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import stem
from diffdiscover3d.errors import InputError

_LEVEL = re.compile(r"_level-(\d+)_dseg$")


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
    found = read_volume(path, allow_constant=True, ignore_affine=True)
    if found.shape != scan.shape:
        raise InputError(f"{path}: has shape {found.shape}, its scan {scan.shape}; give the label map of this scan.")
    tolerance = 1e-2 * min(scan.spacing_mm) + 1e-6 * np.abs(scan.affine).max()  # headers hold 32-bit numbers
    if not np.allclose(found.affine, scan.affine, rtol=0, atol=tolerance):
        raise InputError(f"{path}: is not aligned with its scan (the affines differ); give the label map of this scan.")
    if found.data.min() < 0 or (found.data != np.round(found.data)).any():
        raise InputError(f"{path}: part numbers must be integers from 0; give a label map.")
    sidecar = path.with_name(f"{stem(path)}.json")
    try:
        provenance = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        provenance = {}
    labels = found.data.astype(np.uint16)
    level = _LEVEL.search(stem(path))
    count = max(int(labels.max()) + 1, len(provenance.get("parts", ())))
    return LabelMap(int(level.group(1)) if level else None, labels, count, provenance)

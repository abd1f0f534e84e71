"""Read label maps from disk and compare them with their scan."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import stem
from diffdiscover3d.errors import InputError
from diffdiscover3d.utils.files import read_json

_LARGEST = np.iinfo(np.uint16).max
_RECORDED = ("input", "outputs")
_RESULT = re.compile(r"(?:_level-\d+)?_dseg\.")
_LEVEL = re.compile(r"_level-(\d+)_dseg$")


@dataclass(frozen=True)
class LabelMap:
    """A label map on the canonical grid of its scan.

    Attributes:
        level: its level in the hierarchy, `None` if its name holds none.
        labels: (H, W, D) part numbers.
        num_parts: K.
        provenance: the contents of its sidecar, empty if it has none.
        notes: sentences about a sidecar that does not fit the scan or the label map, for the user.
    """

    level: int | None
    labels: np.ndarray
    num_parts: int
    provenance: dict
    notes: tuple[str, ...] = ()


def is_result_of(path: Path, scan_stem: str) -> bool:
    """Whether a file is called like a result of a scan: `<stem>_dseg.*` or `<stem>_level-<L>_dseg.*`."""
    rest = path.name.removeprefix(scan_stem)
    return path.name.startswith(scan_stem) and _RESULT.match(rest) is not None


def read_sidecar(label_map: Path) -> dict:
    """The contents of a label map's sidecar; empty if there is none, or it is damaged."""
    try:
        found = read_json(label_map.with_name(f"{stem(label_map)}.json"))
    except (OSError, ValueError):
        return {}
    usable = isinstance(found, dict) and all(
        isinstance(found.get(key, {}), dict) for key in ("model", "arguments", *_RECORDED)
    )
    return found if usable and isinstance(found.get("parts", []), list) else {}


def read_label_map(path: str | Path, scan: NiftiVolume) -> LabelMap:
    """Read a label map on the grid of a scan.

    Raises:
        InputError: if it cannot be read, or has another shape or affine than the scan.
    """
    path = Path(path)
    found = read_volume(path, allow_constant=True, ignore_affine=True, nan_to_zero=True)
    if any("NaN or Inf" in note for note in found.notes):
        raise InputError(f"{path}: holds NaN or Inf voxels; give a label map.")
    if found.shape != scan.shape:
        raise InputError(f"{path}: has shape {found.shape}, its scan {scan.shape}; give the label map of this scan.")
    tolerance = 1e-2 * min(scan.spacing_mm) + 1e-6 * np.abs(scan.affine).max()  # headers hold 32-bit numbers
    if not np.allclose(found.affine, scan.affine, rtol=0, atol=tolerance):
        raise InputError(f"{path}: is not aligned with its scan (the affines differ); give the label map of this scan.")
    if found.data.min() < 0 or found.data.max() > _LARGEST or (found.data != np.round(found.data)).any():
        raise InputError(f"{path}: part numbers must be integers from 0 to {_LARGEST}; give a label map.")
    provenance = read_sidecar(path)
    labels = found.data.astype(np.uint16)
    level = _LEVEL.search(stem(path))
    count = max(int(labels.max()) + 1, len(provenance.get("parts", ())))
    notes = tuple(_describe_mismatch(path, provenance, scan, found))
    return LabelMap(int(level.group(1)) if level else None, labels, count, provenance, notes)


def _describe_mismatch(path: Path, provenance: dict, scan: NiftiVolume, labels: NiftiVolume) -> list[str]:
    """Notes where the sidecar of a label map records another scan or another label map."""
    notes = []
    sidecar = path.with_name(f"{stem(path)}.json")
    if not provenance and sidecar.exists():
        notes.append(f"{sidecar.name} is damaged, so it is not known what {path.name} was made of")
    source, outputs = (provenance.get(key, {}) for key in _RECORDED)
    if scan.sha256 is not None and source.get("sha256", scan.sha256) != scan.sha256:
        notes.append(f"{path.name} was made of another file than this scan, or the scan has changed since")
    if outputs.get(path.name, labels.sha256) != labels.sha256:
        notes.append(f"{path.name} has changed since its sidecar was written")
    return notes

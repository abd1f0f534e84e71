"""The report: one HTML file with a viewer, the parts, the tables and the provenance; it opens without a network."""

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff

from diffdiscover3d.data.nifti import NiftiVolume
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import InputError
from diffdiscover3d.files import atomic_file
from diffdiscover3d.reporting.colours import part_colour, part_rgb
from diffdiscover3d.reporting.parts import PartStatistics, measure_parts, nest_levels

MAX_VOXELS = 160**3  # shown at most; a larger scan is resampled for the page, and the page says so
_VIEWER = Path(__file__).parent / "viewer"
_LEVEL = re.compile(r"_level-(\d+)_dseg\.nii(\.gz)?$")


@dataclass(frozen=True)
class LabelMap:
    """A label map on the canonical grid of its scan.

    Attributes:
        level: its level in the hierarchy, `None` if its name tells none.
        labels: (H, W, D) part numbers.
        num_parts: K.
        provenance: what its sidecar says, empty if it has none.
    """

    level: int | None
    labels: np.ndarray
    num_parts: int
    provenance: dict

    @property
    def title(self) -> str:
        """How the page calls it."""
        return f"{self.num_parts} parts" if self.level is None else f"level {self.level}, {self.num_parts} parts"


def read_label_map(path: str | Path, scan: NiftiVolume) -> LabelMap:
    """Read a label map that lies on the grid of a scan.

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
    if not _lies_on(image, scan):
        raise InputError(f"{path}: lies elsewhere than its scan (the affines differ); give the label map of this scan.")
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


def _lies_on(image: nib.spatialimages.SpatialImage, scan: NiftiVolume) -> bool:
    fields = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim", "quatern_b", "quatern_c", "quatern_d")
    if all(f in image.header and np.array_equal(image.header[f], scan.header[f], equal_nan=True) for f in fields):
        return True  # even where the affine itself is unusable
    canonical = image.affine @ inv_ornt_aff(scan.orientation, image.shape)
    return np.allclose(canonical, scan.affine, atol=1e-2)


def write_report(path: str | Path, scan: NiftiVolume, name: str, label_maps: Sequence[str | Path]) -> None:
    """Write the report of a scan and its label maps.

    Args:
        path: the HTML file.
        scan: as read from its file.
        name: of the scan, as the page shall call it.
        label_maps: paths of its label maps, one per level.

    Raises:
        InputError: see [`read_label_map`].
        OutputError: if it cannot be written.
    """
    maps = [read_label_map(p, scan) for p in label_maps]
    step = _shown_grid(scan.data.shape)
    shape = "×".join(map(str, scan.data.shape))
    spacing = "×".join(f"{s:.3g}" for s in scan.spacing_mm)
    summary = f"{shape} voxels of {spacing} mm"
    if step != scan.data.shape:
        shown = "×".join(map(str, step))
        summary += f"; shown here on {shown} voxels to keep the page small, measured at full resolution"
    fields = {
        "TITLE": html.escape(f"Parts found in {name}"),
        "SUMMARY": html.escape(summary),
        "TABLES": "".join(
            _table(number, m, measure_parts(m.labels, scan.data, scan.affine, m.num_parts, topology=True))
            for number, m in enumerate(maps)
        ),
        "TREE": _tree(maps),
        "PROVENANCE": _provenance(maps, scan.notes),
        "LICENSES": html.escape((_VIEWER / "LICENSES.txt").read_text(encoding="utf-8")),
        # "<" cannot end the script element it stands in
        "DATA": json.dumps(_data(scan, maps, step)).replace("<", "\\u003c"),
        "NIIVUE": _niivue(),
        "SCRIPT": (_VIEWER / "report.js").read_text(encoding="utf-8"),
    }
    template = (_VIEWER / "report.html").read_text(encoding="utf-8")
    page = re.sub("@([A-Z]+)@", lambda match: fields[match.group(1)], template)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


@lru_cache(maxsize=1)
def _niivue() -> str:
    return base64.b64encode((_VIEWER / "niivue.js.gz").read_bytes()).decode()


def _shown_grid(shape: Sequence[int]) -> tuple[int, ...]:
    scale = min(1.0, (MAX_VOXELS / np.prod(shape)) ** (1 / 3))
    return tuple(max(1, int(n * scale)) for n in shape) if scale < 1 else tuple(shape)


def _data(scan: NiftiVolume, maps: Sequence[LabelMap], grid: tuple[int, ...]) -> dict:
    factor = np.array(scan.data.shape) / np.array(grid)
    # voxel i of the shown grid covers the voxels from i * factor on, so its centre lies half a factor further
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = np.diag(factor), (factor - 1) / 2
    affine = scan.affine @ move
    shown = resize_volume(torch.from_numpy(scan.data)[None, None], grid)[0, 0].numpy()
    low, high = float(shown.min()), float(shown.max())
    slope = (high - low) / 255 or 1.0
    window = [float(x) for x in np.percentile(shown, (0.5, 99.5))]
    if window[0] == window[1]:
        window = [low, high]
    picks = [
        np.clip(np.round(np.arange(n) * f + (f - 1) / 2), 0, None).astype(int)
        for n, f in zip(grid, factor, strict=True)
    ]
    levels = []
    for number, label_map in enumerate(maps):
        labels = label_map.labels[np.ix_(*picks)]
        labels = labels.astype(np.uint8 if label_map.num_parts <= 256 else np.uint16)
        levels.append(
            {
                "key": str(number),
                "title": label_map.title,
                "name": f"level{number}.nii.gz",
                "nifti": _encode(labels, affine),
                "colours": [[round(255 * c) for c in part_rgb(k)] for k in range(label_map.num_parts)],
            }
        )
    grey = np.round((shown - low) / slope).astype(np.uint8)
    scan_data = {"name": "scan.nii.gz", "nifti": _encode(grey, affine, slope, low), "low": window[0], "high": window[1]}
    return {"scan": scan_data, "levels": levels}


def _encode(array: np.ndarray, affine: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> str:
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, inter)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), 9, mtime=0)).decode()


def _table(key: int, label_map: LabelMap, parts: Sequence[PartStatistics]) -> str:
    head = ["show", "part", "", "volume (mL)", "share", "voxels", "intensity (mean ± SD)", "centre R, A, S (mm)"]
    head += ["pieces", "touches"]
    total = sum(p.voxels for p in parts)
    rows = []
    for part in parts:
        centre = ", ".join(f"{c:.1f}" for c in part.centroid_mm) if part.voxels else "–"
        grey = f"{part.mean_intensity:.4g} ± {part.std_intensity:.3g}" if part.voxels else "–"
        cells = [
            f'<input type="checkbox" aria-label="show part {part.index}" data-part="{part.index}" '
            f'data-level="{key}"{" checked" if part.index else ""}>',
            f"part {part.index}",
            f'<span class="swatch" style="background:{part_colour(part.index)}"></span>',
            f"{part.volume_ml:,.2f}",
            f"{100 * part.voxels / total:.1f} %",
            f"{part.voxels:,}",
            grey,
            centre,
            str(part.components),
            ", ".join(map(str, part.neighbours)) or "–",
        ]
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    titles = "".join(f"<th>{h}</th>" for h in head)
    return (
        f'<div class="scroll" data-table="{key}"><table><caption class="soft">{html.escape(label_map.title)}'
        f"</caption><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _tree(maps: Sequence[LabelMap]) -> str:
    """The nested list of parts, where several levels are there."""
    levels = {m.level: m for m in maps if m.level is not None}
    if len(levels) < 2:
        return ""
    links = nest_levels({k: m.labels for k, m in levels.items()}, {k: m.num_parts for k, m in levels.items()})

    def branch(level: int, part: int, share: str) -> str:
        own = [x for x in links if x["parent_level"] == level and x["parent"] == part]
        inside = "".join(branch(x["level"], x["part"], f", {100 * x['overlap']:.0f} % of it in here") for x in own)
        mark = f'<span class="swatch" style="background:{part_colour(part)}"></span>'
        text = f'{mark} part {part} <span class="soft">of level {level}{share}</span>'
        return f"<li>{text}{f'<ul>{inside}</ul>' if inside else ''}</li>"

    first = min(levels)
    roots = "".join(branch(first, part, "") for part in range(levels[first].num_parts))
    return f'<h2>Which part lies in which</h2><ul class="tree">{roots}</ul>'


def _provenance(maps: Sequence[LabelMap], notes: Sequence[str]) -> str:
    rows: list[tuple[str, str]] = []
    for label_map in maps:
        made = label_map.provenance
        if not made:
            continue
        model = made.get("model", {})
        weights = "; ".join(f"{k} sha256 {v}" for k, v in (model.get("sha256") or {}).items())
        revision = f", revision {model['revision']}" if model.get("revision") else ""
        rows.append((label_map.title, f"model {model.get('id')}{revision} {weights}"))
    first = next((m.provenance for m in maps if m.provenance), None)
    if first:
        arguments = ", ".join(f"{k} {v}" for k, v in first.get("arguments", {}).items() if v not in (None, False))
        source = first.get("input", {})
        rows += [
            ("diffdiscover3d", str(first.get("diffdiscover3d"))),
            ("scan", f"{source.get('name')}, sha256 {source.get('sha256')}"),
            ("arguments", arguments),
            ("time and memory", f"{first.get('seconds')} s, at most {first.get('peak_memory_mib')} MiB"),
        ]
    rows += [("note", note) for note in dict.fromkeys([*notes, *(first or {}).get("notes", [])])]
    if not first:
        rows.insert(0, ("labels", "the label maps came without a record of how they were made"))
    body = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f'<table class="plain">{body}</table>'

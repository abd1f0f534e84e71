"""The report: one HTML file with a 3D viewer, the tables of parts and the provenance; it needs no network."""

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.data.formats.units import VOXELS
from diffdiscover3d.reporting.colours import part_colour, part_rgb
from diffdiscover3d.reporting.frames import Frame
from diffdiscover3d.reporting.parts import PartStatistics
from diffdiscover3d.utils.files import write_text

MAX_VOXELS = 160**3  # a larger scan is resampled for the page, with a line about it
_VIEWER = Path(__file__).parent / "viewer"


@dataclass(frozen=True)
class ShownScan:
    """A scan as the page shows it.

    Attributes:
        name: of the scan.
        shape: (H, W, D), in voxels.
        affine: (4, 4), voxels to millimetres.
        image: its intensities on its [`shown_grid`].
        notes: sentences about anything unusual in it.
    """

    name: str
    shape: Sequence[int]
    affine: np.ndarray
    image: np.ndarray
    notes: Sequence[str]
    frame: Frame = field(default_factory=Frame)


@dataclass(frozen=True)
class ShownLevel:
    """A label map as the page shows it.

    Attributes:
        level: its level in the hierarchy; `None` if there is one level only, or it is not known.
        provenance: the contents of its sidecar, empty if it has none.
        parts: all its parts, with their components and neighbours.
        labels: part numbers at the [`shown_voxels`].
    """

    level: int | None
    provenance: dict
    parts: Sequence[PartStatistics]
    labels: np.ndarray

    @property
    def numbers(self) -> int:
        """One more than the largest part number."""
        return max((part.index for part in self.parts), default=-1) + 1

    @property
    def title(self) -> str:
        """Its name on the page."""
        return f"{len(self.parts)} parts" if self.level is None else f"level {self.level}, {len(self.parts)} parts"


def write_page(path: str | Path, scan: ShownScan, levels: Sequence[ShownLevel], links: Sequence[dict]) -> None:
    """Write the report from what it shows; its size is bounded however large the scan is.

    Args:
        path: the HTML file.
        scan: the scan, with its intensities on the shown grid.
        levels: its label maps on the same grid, the coarsest first.
        links: of [`nest_levels`], empty if there is one level.

    Raises:
        OutputError: if it cannot be written.
    """
    unit = scan.frame.unit
    spacing = "×".join(f"{s * unit.per_mm:.3g}" for s in np.linalg.norm(scan.affine[:3, :3], axis=0))
    size = "unknown size" if unit == VOXELS else f"{spacing} {unit.length}"
    summary = f"{'×'.join(map(str, scan.shape))} voxels of {size}"
    if scan.image.shape != tuple(scan.shape):
        grid = "×".join(map(str, scan.image.shape))
        summary += f"; shown here on {grid} voxels to keep the page small, measured at full resolution"
    fields = {
        "TITLE": html.escape(f"Parts found in {scan.name}"),
        "SUMMARY": html.escape(summary),
        "TABLES": "".join(_table(number, level, scan.frame) for number, level in enumerate(levels)),
        "TREE": _tree(levels, links),
        "NOTES": _notes(levels, scan.notes),
        "PROVENANCE": _provenance(levels),
        "LICENSES": html.escape((_VIEWER / "LICENSES.txt").read_text(encoding="utf-8")),
        # "<" could end the script element that holds the data
        "DATA": json.dumps(_data(scan, levels)).replace("<", "\\u003c"),
        "NIIVUE": _niivue(),
        "SCRIPT": (_VIEWER / "report.js").read_text(encoding="utf-8"),
    }
    colours = range(max((level.numbers for level in levels), default=0))
    fields["STYLE"] = (_VIEWER / "report.css").read_text(encoding="utf-8") + swatch_styles(colours)
    fields["STYLEHASH"] = csp_hash(fields["STYLE"])
    fields["SCRIPTHASH"] = f"{csp_hash(fields['SCRIPT'])} {_niivue_hash()}"
    template = (_VIEWER / "report.html").read_text(encoding="utf-8")
    page = re.sub("@([A-Z]+)@", lambda match: fields[match.group(1)], template)
    write_text(path, page)


def csp_hash(text: str) -> str:
    """The source expression that allows one inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def swatch_styles(parts: Iterable[int]) -> str:
    """CSS classes `part-K` with the colours of the parts; style attributes would need a laxer policy."""
    return "".join(f".part-{part} {{ background: {part_colour(part)}; }}\n" for part in parts)


@lru_cache(maxsize=1)
def _niivue_hash() -> str:
    return csp_hash(gzip.decompress((_VIEWER / "niivue.js.gz").read_bytes()).decode())


@lru_cache(maxsize=1)
def _niivue() -> str:
    return base64.b64encode((_VIEWER / "niivue.js.gz").read_bytes()).decode()


def shown_grid(shape: Sequence[int]) -> tuple[int, ...]:
    """The grid on which a scan of this shape is shown: its own, or a coarser one with the same extent."""
    scale = min(1.0, (MAX_VOXELS / np.prod(shape)) ** (1 / 3))
    return tuple(max(1, int(n * scale)) for n in shape) if scale < 1 else tuple(shape)


def shown_voxels(shape: Sequence[int], grid: Sequence[int]) -> list[np.ndarray]:
    """The indices along each axis of the voxels nearest to the centres of the shown voxels."""
    factors = [n / count for n, count in zip(shape, grid, strict=True)]
    return [
        np.clip(np.round(np.arange(count) * f + (f - 1) / 2), 0, None).astype(int)
        for count, f in zip(grid, factors, strict=True)
    ]


def _data(scan: ShownScan, shown_levels: Sequence[ShownLevel]) -> dict:
    shown = scan.image
    factor = np.array(scan.shape) / np.array(shown.shape)
    # voxel i of the shown grid starts at voxel i * factor, so its centre is shifted by (factor - 1) / 2
    move = np.eye(4)
    move[:3, :3], move[:3, 3] = np.diag(factor), (factor - 1) / 2
    affine = scan.affine @ move
    affine[:3] *= scan.frame.unit.per_mm  # the viewer's numbers are in the unit of the tables
    world = np.eye(4)
    if not scan.frame.anatomical:
        # the viewer shows the volume as it is in memory, upright; positions are those of the file
        plain = np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1.0])
        world, affine = affine @ np.linalg.inv(plain), plain
    low, high = float(shown.min()), float(shown.max())
    slope = (high - low) / 255 or 1.0
    window = [float(x) for x in np.percentile(shown, (0.5, 99.5))]
    if window[0] == window[1]:
        window = [low, high]
    levels = []
    for number, level in enumerate(shown_levels):
        labels = level.labels.astype(np.uint8 if level.numbers <= 256 else np.uint16)
        levels.append(
            {
                "key": str(number),
                "title": level.title,
                "name": f"level{number}.nii.gz",
                "nifti": _encode(labels, affine),
                "colours": [[round(255 * c) for c in part_rgb(k)] for k in range(level.numbers)],
            }
        )
    grey = np.round((shown - low) / slope).astype(np.uint8)
    scan_data = {"name": "scan.nii.gz", "nifti": _encode(grey, affine, slope, low), "low": window[0], "high": window[1]}
    frame = scan.frame
    return {
        "scan": scan_data,
        "levels": levels,
        "unit": frame.unit.length,
        "world": world.ravel().tolist(),
        "anatomical": frame.anatomical,
        "radiological": frame.radiological,
        "planes": frame.planes,
    }


def _encode(array: np.ndarray, affine: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> str:
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, inter)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), 9, mtime=0)).decode()


def _table(key: int, level: ShownLevel, frame: Frame) -> str:
    unit = frame.unit
    head = ["show", "part", "", *([] if unit == VOXELS else [f"volume ({unit.volume})"]), "share", "voxels"]
    head += ["intensity (mean ± SD)", f"centre {frame.axes} ({unit.length})", "pieces", "touches"]
    total = sum(p.voxels for p in level.parts)
    background = 0 if level.provenance.get("background") is not None else None
    rows = []
    for part in level.parts:
        centre = ", ".join(f"{c * unit.per_mm:.1f}" for c in part.centroid_mm) if part.voxels else "–"
        grey = f"{part.mean_intensity:.4g} ± {part.std_intensity:.3g}" if part.voxels else "–"
        cells = [
            f'<input type="checkbox" aria-label="show part {part.index}" data-part="{part.index}" '
            f'data-level="{key}"{"" if part.index == background else " checked"}>',
            f"part {part.index}",
            f'<span class="swatch part-{part.index}"></span>',
            *([] if unit == VOXELS else [_volume(part.volume_ml * 1000 * unit.volume_per_mm3)]),
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
        f'<div class="scroll" data-table="{key}"><table><caption class="soft">{html.escape(level.title)}'
        f"</caption><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _volume(value: float) -> str:
    return f"{value:,.2f}" if value < 1e5 else f"{value:,.0f}"


def _tree(levels: Sequence[ShownLevel], links: Sequence[dict]) -> str:
    """The nested list of parts, if there are several levels."""
    if not links:
        return ""

    def branch(level: int, part: int, share: str) -> str:
        own = [x for x in links if x["parent_level"] == level and x["parent"] == part]
        inside = "".join(branch(x["level"], x["part"], f", {100 * x['overlap']:.0f} % of it in here") for x in own)
        mark = f'<span class="swatch part-{part}"></span>'
        text = f'{mark} part {part} <span class="soft">of level {level}{share}</span>'
        return f"<li>{text}{f'<ul>{inside}</ul>' if inside else ''}</li>"

    first = min((x for x in levels if x.level is not None), key=lambda x: x.level)
    roots = "".join(branch(first.level, part, "") for part in (p.index for p in first.parts))
    return f'<h2>Which part lies in which</h2><ul class="tree">{roots}</ul>'


def _notes(levels: Sequence[ShownLevel], notes: Sequence[str]) -> str:
    """Notes about the scan and from the record of its label maps, each once."""
    first = next((x.provenance for x in levels if x.provenance), {})
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys([*notes, *first.get("notes", [])]))
    return f'<ul class="notes">{listed}</ul>' if listed else ""


def _provenance(levels: Sequence[ShownLevel]) -> str:
    rows: list[tuple[str, str]] = []
    for level in levels:
        made = level.provenance
        if not made:
            continue
        model = made.get("model", {})
        weights = "; ".join(f"{k} sha256 {v}" for k, v in (model.get("sha256") or {}).items())
        revision = f", revision {model['revision']}" if model.get("revision") else ""
        rows.append((level.title, f"model {model.get('id')}{revision} {weights}"))
    first = next((x.provenance for x in levels if x.provenance), None)
    if first:
        arguments = ", ".join(f"{k} {v}" for k, v in first.get("arguments", {}).items() if v not in (None, False))
        source = first.get("input", {})
        rows += [
            ("diffdiscover3d", str(first.get("diffdiscover3d"))),
            ("scan", f"{source.get('name')}, sha256 {source.get('sha256')}"),
            ("arguments", arguments),
            ("time and memory", f"{first.get('seconds')} s, at most {first.get('peak_memory_mib')} MiB"),
        ]
    if not first:
        rows.insert(0, ("labels", "the label maps came without a record of how they were made"))
    body = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f'<table class="plain">{body}</table>'

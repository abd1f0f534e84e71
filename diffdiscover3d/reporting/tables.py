"""Tables of parts for other tools: BIDS TSV, ITK-SNAP labels, a colour table of 3D Slicer."""

import math
from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.data.formats.units import VOXELS
from diffdiscover3d.reporting.colours import part_colour, part_rgb
from diffdiscover3d.reporting.frames import Frame
from diffdiscover3d.reporting.parts import PartStatistics
from diffdiscover3d.utils.files import write_text
from diffdiscover3d.utils.terminal import printable

_DEFAULT = Frame()


def part_columns(frame: Frame = _DEFAULT) -> dict[str, dict]:
    """The columns beyond those of BIDS, with their descriptions for the sidecar."""
    unit = frame.unit
    volume = {f"volume_{unit.volume_key}": {"Description": "Volume of the part", "Units": unit.volume}}
    return {
        **(volume if unit != VOXELS else {}),
        "voxels": {"Description": "Number of voxels"},
        "mean_intensity": {"Description": "Mean of the scan's values in the part"},
    }


def statistics_columns(frame: Frame = _DEFAULT) -> dict[str, dict]:
    """Further columns, if components and neighbours were measured."""
    towards = ("towards the right", "towards the front", "upwards") if frame.anatomical else ("in x", "in y", "in z")
    return {
        "std_intensity": {"Description": "Standard deviation of the scan's values in the part"},
        **{
            f"centroid_{axis}": {"Description": f"Mean position of the voxels, {way}", "Units": frame.unit.length}
            for axis, way in zip("xyz", towards, strict=True)
        },
        "components": {"Description": "Number of pieces connected through voxel faces"},
        "neighbours": {"Description": "Indices of the parts sharing a voxel face, separated by commas"},
    }


def part_name(part: int, background: str | None = None) -> str:
    """The name of a part, which is its number: parts are found without labels.

    Args:
        background: the name of part 0, if it is a background.
    """
    return background if background is not None and part == 0 else f"part {part}"


def write_part_table(
    path: str | Path, parts: Sequence[PartStatistics], frame: Frame = _DEFAULT, background: str | None = None
) -> None:
    """Write the lookup table of BIDS for a `_dseg.nii.gz`: index, name, abbreviation, color and statistics.

    The columns of [`statistics_columns`] are added if components and neighbours were measured.
    See https://bids-specification.readthedocs.io, "Common image-derived labels".
    """
    topology = all(p.components is not None for p in parts)
    columns = ["index", "name", "abbreviation", "color", *part_columns(frame)]
    columns += statistics_columns(frame) if topology else []
    lines = ["\t".join(columns)]
    for part in parts:
        row = [part.index, part_name(part.index, background), f"P{part.index}", part_colour(part.index)]
        if frame.unit != VOXELS:
            row += [_number(part.volume_ml * 1000 * frame.unit.volume_per_mm3)]
        row += [part.voxels, _number(part.mean_intensity)]
        if topology:
            centroid = [_number(c * frame.unit.per_mm) for c in part.centroid_mm]
            row += [_number(part.std_intensity), *centroid, part.components]
            row += [",".join(map(str, part.neighbours)) or "n/a"]
        lines.append("\t".join(map(str, row)))
    _write(path, lines)


def write_itksnap_labels(path: str | Path, num_parts: int, background: str | None = None) -> None:
    """Write a label description file of ITK-SNAP: index, red, green, blue, opacity, visible, mesh, name.

    Part 0 is a part like the others and visible, unless it is the background that was asked for.
    """
    lines = [
        "################################################",
        "# ITK-SnAP Label Description File",
        "# File format:",
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL",
        "################################################",
    ]
    for part in range(num_parts):
        shown = int(part > 0 or background is None)
        red, green, blue = _rgb255(part)
        colour = f"{red:5d} {green:4d} {blue:4d} {shown:8d} {shown:2d} {shown:2d}"
        lines.append(f'{part:5d} {colour}    "{part_name(part, background)}"')
    _write(path, lines)


def write_slicer_colours(path: str | Path, num_parts: int, background: str | None = None) -> None:
    """Write a colour table of 3D Slicer: index, name without spaces, red, green, blue, opacity (0 of a background)."""
    lines = [f"# Color table file {printable(Path(path).name)}", f"# {num_parts} values"]
    for part in range(num_parts):
        red, green, blue = _rgb255(part)
        name = part_name(part, background).replace(" ", "_")
        lines.append(f"{part} {name} {red} {green} {blue} {255 if part or background is None else 0}")
    _write(path, lines)


def _rgb255(part: int) -> tuple[int, int, int]:
    return tuple(round(255 * c) for c in part_rgb(part))


def _number(value: float) -> str:
    """A number as text; BIDS writes n/a for missing values."""
    return "n/a" if math.isnan(value) else f"{value:.6g}"


def _write(path: str | Path, lines: Sequence[str]) -> None:
    write_text(path, "\n".join(lines) + "\n")

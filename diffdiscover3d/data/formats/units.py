"""Units of length: what files give, and which one fits the size of a voxel."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SPACING_UNITS = ("mm", "voxel")  # of a target spacing: lengths, or voxels of each scan
UNKNOWN = "voxel"  # the file gives no physical size

# length of each unit in mm
IN_MM = {"m": 1e3, "cm": 10.0, "mm": 1.0, "um": 1e-3, "nm": 1e-6, "angstrom": 1e-7, "inch": 25.4}
_NAMES = {
    "m": ("m", "meter", "metre", "meters", "metres"),
    "cm": ("cm", "centimeter", "centimetre", "centimeters"),
    "mm": ("mm", "millimeter", "millimetre", "millimeters"),
    "um": ("um", "µm", "μm", "\\u00b5m", "micron", "microns", "micrometer", "micrometre", "micrometers"),
    "nm": ("nm", "nanometer", "nanometre", "nanometers"),
    "angstrom": ("angstrom", "angstroms", "ångström", "å", "Å", "a"),
    "inch": ("inch", "in", "inches"),
}
_UNIT_OF = {name.lower(): unit for unit, names in _NAMES.items() for name in names}


def parse_unit(name: str | None) -> str | None:
    """The unit meant by a name as files spell it, `None` for an unknown one.

    >>> parse_unit("micrometer"), parse_unit("Å"), parse_unit("pixel")
    ('um', 'angstrom', None)
    """
    return None if name is None else _UNIT_OF.get(str(name).strip().strip("\0").lower())


def parse_voxel_size(text: str, name: str = "voxel_size") -> tuple[tuple[float, float, float], str]:
    """Edge lengths of a voxel along x, y, z and their unit, from one length or three; `name` is for messages.

    Raises:
        ValueError: if it is not of that form.

    >>> parse_voxel_size("0.1,0.1,0.3um"), parse_voxel_size("13.5 Å")
    (((0.1, 0.1, 0.3), 'um'), ((13.5, 13.5, 13.5), 'angstrom'))
    """
    match = re.fullmatch(r"([0-9.eE+,x× -]+?)\s*([^\d\s.,+-]+)", text.strip())
    unit = parse_unit(match.group(2)) if match else None
    try:
        lengths = [float(part) for part in re.split(r"\s*[,x×]\s*|\s+", match.group(1).strip())] if unit else []
    except ValueError:
        lengths = []
    if len(lengths) not in (1, 3) or not all(0 < length < float("inf") for length in lengths):
        raise ValueError(f"`{name}` must be one length or three with a unit, as 0.1,0.1,0.3um, got {text!r}.")
    return tuple(lengths * 3 if len(lengths) == 1 else lengths), unit


@dataclass(frozen=True)
class DisplayUnit:
    """The unit in which lengths and volumes of a scan are shown.

    Attributes:
        length: its symbol, as people write it.
        per_mm: how many of it make one mm; 1 where the size of a voxel is unknown.
        volume: symbol of the unit of volumes.
        volume_key: the same in column names.
        volume_per_mm3: how many of that make one mm³.
    """

    length: str
    per_mm: float
    volume: str
    volume_key: str
    volume_per_mm3: float


MILLILITRES = DisplayUnit("mm", 1.0, "mL", "ml", 1e-3)
_BY_EDGE = (  # the smallest value of the longest voxel edge, in mm, for each unit, in decreasing order
    (0.2, MILLILITRES),
    (5e-3, DisplayUnit("mm", 1.0, "mm³", "mm3", 1.0)),
    (5e-5, DisplayUnit("µm", 1e3, "µm³", "um3", 1e9)),
    (0.0, DisplayUnit("nm", 1e6, "nm³", "nm3", 1e18)),
)
VOXELS = DisplayUnit("voxels", 1.0, "voxels", "voxels", 1.0)


def display_unit(spacing_mm: Sequence[float], unit: str = "mm") -> DisplayUnit:
    """The unit that fits voxels of this size, so that sizes are neither 5.8e-05 nor 1e+09.

    Voxels of at least 0.2 mm are measured in mm and mL, of at least 5 µm in mm and mm³, of at least 50 nm in µm, and
    smaller ones in nm.

    Args:
        spacing_mm: edge lengths of a voxel.
        unit: of the file; `UNKNOWN` where it gives none.

    >>> display_unit((0.7, 0.7, 3.0)).volume, display_unit((1e-6, 1e-6, 1e-6)).volume
    ('mL', 'nm³')
    """
    if unit == UNKNOWN:
        return VOXELS
    edge = max(spacing_mm) * (1 + 1e-6)  # headers hold 32-bit numbers
    return next(found for least, found in _BY_EDGE if edge >= least)

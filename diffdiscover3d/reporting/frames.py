"""How the space of a scan is shown: the unit of lengths, and what its axes are called."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffdiscover3d.data.formats.units import MILLILITRES, DisplayUnit, display_unit


@dataclass(frozen=True)
class Frame:
    """The space of a scan, for tables and pictures.

    Attributes:
        unit: of lengths and volumes.
        anatomical: the axes are right, anterior, superior of a patient; otherwise x, y, z of a specimen.
        radiological: pictures have the patient's right on the left, as seen from the feet; only where `anatomical`.
    """

    unit: DisplayUnit = MILLILITRES
    anatomical: bool = True
    radiological: bool = True

    @property
    def axes(self) -> str:
        """Names of the axes of positions."""
        return "R, A, S" if self.anatomical else "x, y, z"

    @property
    def planes(self) -> tuple[str, str, str]:
        """Names of the planes across the three canonical axes."""
        return ("sagittal", "coronal", "axial") if self.anatomical else ("yz", "xz", "xy")

    @property
    def mirrored(self) -> bool:
        """Whether pictures have the first axis from right to left."""
        return self.anatomical and self.radiological


def frame_of(
    spacing_mm: Sequence[float], unit: str = "mm", anatomical: bool = True, neurological: bool = False
) -> Frame:
    """The frame of a scan.

    Args:
        spacing_mm, unit, anatomical: of the scan.
        neurological: pictures of patients have the left on the left.
    """
    return Frame(display_unit(spacing_mm, unit), anatomical, not neurological)

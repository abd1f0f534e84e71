"""The grid that a network works on, of a fixed shape or with voxels of a fixed size, and the choice of that size.

The module imports no torch: the memory that a scan needs is estimated before torch is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffdiscover3d.data.formats.units import UNKNOWN, display_unit
from diffdiscover3d.errors import InputError

ANISOTROPY = 3.0  # nnU-Net's threshold: a stack is anisotropic if an axis is so much coarser than the others
_LOWEST = 10  # percentile of the spacings along that axis
_COARSER = 1.03  # factor by which nnU-Net coarsens a spacing, until the volumes are small enough
_MOST = 64.0  # factor between the edge lengths of a scan and the target; beyond it one of them must be wrong
Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class WorkingGrid:
    """The grid to which scans are resampled before a network sees them. Grid and scan have the same extent.

    Attributes:
        shape: fixed shape of the grid, whatever the scan's is; `None` if the voxels have a fixed size.
        spacing: target edge lengths of a voxel along the canonical axes, in `unit`.
        unit: "mm", or "voxel" for edge lengths in voxels of the scan.
    """

    shape: Shape | None = None
    spacing: Spacing | None = None
    unit: str = "mm"

    def of(self, shape: Sequence[int], spacing_mm: Sequence[float], unit: str = "mm", name: object = "") -> Shape:
        """The shape of the grid for a scan.

        Args:
            shape: (H, W, D) of the scan in canonical orientation.
            spacing_mm: edge lengths of its voxels.
            unit: of its file; a scan of unknown voxel size is not resampled to a spacing in mm.
            name: of the scan, for messages.

        Raises:
            InputError: if the voxels of the scan and the target differ in size by a factor above 64.
        """
        if self.shape is not None:
            return self.shape
        if self.leaves_as_it_is(unit):
            return tuple(shape)
        edges = spacing_mm if self.unit == "mm" else (1.0, 1.0, 1.0)
        factors = [edge / target for edge, target in zip(edges, self.spacing, strict=True)]
        if not all(1 / _MOST <= factor <= _MOST for factor in factors):
            raise InputError(
                f"{name}: has voxels of {describe_spacing(edges, self.unit)}, and the model works on voxels of "
                f"{describe_spacing(self.spacing, self.unit)}; correct the voxel size (--voxel-size), or use a model "
                "that was trained at this scale."
            )
        return resampled_shape(shape, edges, self.spacing)

    def leaves_as_it_is(self, unit: str) -> bool:
        """Whether a scan cannot be resampled, because the unit of its file is unknown and the target is in mm."""
        return self.shape is None and self.unit == "mm" and unit == UNKNOWN

    def note(self, unit: str) -> str | None:
        """A note for the user about a scan that [`leaves_as_it_is`] is true of; otherwise `None`."""
        if not self.leaves_as_it_is(unit):
            return None
        return (
            f"the file gives no voxel size: its voxels were taken as {describe_spacing(self.spacing)}, the size that "
            "the model works on; --voxel-size gives it"
        )


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> Shape:
    """The shape of a grid of the same extent with voxels of the target size, to the nearest voxel.

    >>> resampled_shape((512, 512, 30), (5.0, 5.0, 40.0), (20.0, 20.0, 40.0))
    (128, 128, 30)
    """
    sides = zip(shape, spacing, target, strict=True)
    return tuple(max(1, round(count * edge / wanted)) for count, edge, wanted in sides)


def spacing_on(grid: Sequence[int], shape: Sequence[int], spacing: Sequence[float]) -> Spacing:
    """The edge lengths of the voxels of a grid that has the extent of another one."""
    return tuple(float(count * edge / n) for n, count, edge in zip(grid, shape, spacing, strict=True))


def target_spacing(spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> Spacing:
    """The target spacing of nnU-Net for a set of scans (Isensee et al., Nature Methods 2021).

    It is the median spacing along each axis. If one axis is more than 3 times coarser than the others and has less
    than a third of their voxels, its target is the 10th percentile of the spacings along it, but not finer than the
    others, so that the finer ones of several stacks keep their slices.

    Args:
        spacings: edge lengths of the scans' voxels along the canonical axes.
        shapes: of the scans, along the same axes.

    >>> target_spacing([(5, 5, 20), (5, 5, 40), (5, 5, 40)], [(512, 512, 60), (512, 512, 30), (512, 512, 30)])
    (5.0, 5.0, 24.0)
    """
    spacings, median = np.asarray(spacings, float), np.median(np.asarray(spacings, float), axis=0)
    size = np.median(np.asarray(shapes, float), axis=0)
    coarse = int(np.argmax(median))
    others = [axis for axis in range(3) if axis != coarse]
    if median[coarse] > ANISOTROPY * median[others].max() and size[coarse] * ANISOTROPY < size[others].min():
        median[coarse] = max(np.percentile(spacings[:, coarse], _LOWEST), median[others].max())
    return tuple(float(f"{edge:.6g}") for edge in median)


def coarsen_spacing(
    target: Sequence[float],
    spacings: Sequence[Sequence[float]],
    shapes: Sequence[Sequence[int]],
    voxels: float,
    most_voxels: float = math.inf,
) -> Spacing:
    """Coarsen a target spacing until the scans are small enough, as nnU-Net does for its low resolution.

    Axes that are more than twice finer than the coarsest one are coarsened first; after that all axes are.

    Args:
        target: the spacing to begin with.
        spacings, shapes: of the scans, as for [`target_spacing`].
        voxels: of the median of the resampled shapes.
        most_voxels: of each resampled scan.

    >>> coarsen_spacing((5.0, 5.0, 40.0), [(5.0, 5.0, 40.0)], [(512, 512, 30)], 128 * 128 * 30 + 1)
    (20.0595, 20.0595, 40.0)
    """
    spacing = np.asarray(target, float)

    def small_enough() -> bool:
        found = np.array([resampled_shape(n, s, spacing) for n, s in zip(shapes, spacings, strict=True)])
        return np.prod(np.median(found, axis=0)) <= voxels and found.prod(axis=1).max() <= most_voxels

    while not small_enough():
        fine = spacing.max() / spacing > 2
        spacing = np.where(fine if fine.any() else True, spacing * _COARSER, spacing)
    return tuple(float(f"{edge:.6g}") for edge in spacing)


def describe_spacing(spacing: Sequence[float], unit: str = "mm") -> str:
    """Edge lengths with the unit that fits them.

    >>> describe_spacing((5e-6, 5e-6, 4e-5)), describe_spacing((2, 2, 1), "voxel")
    ('5×5×40 nm', '2×2×1 voxels')
    """
    shown = display_unit(spacing, UNKNOWN if unit == "voxel" else "mm")
    return "×".join(f"{edge * shown.per_mm:.3g}" for edge in spacing) + f" {shown.length}"

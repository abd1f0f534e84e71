"""Pictures of volumes: three orthogonal slices through the centre, with or without overlaid parts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from diffdiscover3d.reporting.colours import part_rgb
from diffdiscover3d.reporting.frames import Frame
from diffdiscover3d.utils.files import atomic_file

_DEFAULT = Frame()
# letters at the left, right, top and bottom of the planes across the canonical axes, without mirroring
_MARKS = (("P", "A", "S", "I"), ("L", "R", "S", "I"), ("L", "R", "A", "P"))


def save_slices(
    path: str | Path,
    volumes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray | None] | None = None,
    *,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    titles: Sequence[str] | None = None,
    num_parts: int | None = None,
    frame: Frame | None = None,
) -> None:
    """Write a PNG with a row per volume and its three middle slices; with labels, each beside its overlay.

    Args:
        path: the PNG to write.
        volumes: (H, W, D) arrays in RAS+ orientation, or (3, H, W, D) ones in [0, 1] shown as red, green, blue.
        labels: (H, W, D) part numbers for each volume.
        spacing_mm: of the voxels, so that anisotropic ones are drawn in proportion.
        titles: one for each row.
        num_parts: length of the legend (default: from the largest label).
        frame: names the planes and the sides of the patient; default: none are marked.
    """
    labels = [None] * len(volumes) if labels is None else labels
    if num_parts is None and any(x is not None for x in labels):
        num_parts = 1 + max(int(x.max()) for x in labels if x is not None)
    cuts = [middle_slices(volume) for volume in volumes]
    overlays = [None if x is None else middle_slices(x) for x in labels]
    save_cuts(path, cuts, overlays, spacing_mm=spacing_mm, titles=titles, num_parts=num_parts, frame=frame)


def save_cuts(
    path: str | Path,
    cuts: Sequence[Sequence[np.ndarray]],
    labels: Sequence[Sequence[np.ndarray] | None],
    *,
    spacing_mm: Sequence[float],
    titles: Sequence[str] | None,
    num_parts: int | None,
    frame: Frame | None = None,
) -> None:
    """Write the same picture from slices, for volumes that are not in memory.

    Args:
        cuts: for each row the middle slices across the first, second and third axis, (W, D), (H, D) and (H, W); RGB
            ones have a first axis of length 3.
        labels: the same slices of the label maps, all of them or none.
        frame: as for [`save_slices`].
    """
    named = _DEFAULT if frame is None else frame
    mirrored = frame is not None and frame.mirrored
    overlaid = any(x is not None for x in labels)
    columns = 6 if overlaid else 3
    figure = Figure(figsize=(2.4 * columns, 2.6 * len(cuts) + 0.5), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cuts), columns, squeeze=False)
    for row, (three, parts) in enumerate(zip(cuts, labels, strict=True)):
        for plane in range(3):
            grey = _upright(three[plane], mirrored and plane > 0)
            aspect = _aspect(spacing_mm, plane)
            _show(axes[row, plane], grey, aspect)
            if frame is not None and frame.anatomical:
                _mark(axes[row, plane], plane, mirrored)
            if overlaid:
                over = _overlay(grey, _upright(parts[plane], mirrored and plane > 0))
                _show(axes[row, 3 + plane], over, aspect)
            if row == 0:
                for first in range(0, columns, 3):
                    axes[0, first + plane].set_title(named.planes[plane], color="white", fontsize=9)
        if titles:
            axes[row, 0].set_ylabel(titles[row], color="white", fontsize=9)
    if overlaid:
        handles = [Patch(color=part_rgb(k), label=f"part {k}") for k in range(num_parts)]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(num_parts, 8), labelcolor="white", frameon=False
        )
    with atomic_file(path, suffix=".png") as temporary:
        figure.savefig(temporary, dpi=100, format="png", metadata={"Software": "diffdiscover3d"})


def middle_slices(volume: np.ndarray) -> list[np.ndarray]:
    """The middle slice across each of the last three axes."""
    return [np.take(volume, volume.shape[axis] // 2, axis=axis) for axis in range(volume.ndim - 3, volume.ndim)]


def _mark(axis, plane: int, mirrored: bool) -> None:
    """Letters for the sides of the patient at the edges of a slice."""
    left, right, top, bottom = _MARKS[plane]
    if mirrored and plane > 0:
        left, right = right, left
    style = {"color": "white", "fontsize": 8, "transform": axis.transAxes, "ha": "center", "va": "center"}
    style["path_effects"] = [withStroke(linewidth=2, foreground="black")]
    for x, y, letter in ((0.04, 0.5, left), (0.96, 0.5, right), (0.5, 0.95, top), (0.5, 0.05, bottom)):
        axis.text(x, y, letter, **style)


def _upright(cut: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Rotate a slice so that superior (or anterior) is up; channels go last."""
    turned = np.rot90(np.moveaxis(cut, 0, -1) if cut.ndim == 3 else cut)
    return turned[:, ::-1] if mirrored else turned


def _aspect(spacing_mm: Sequence[float], plane: int) -> float:
    across, up = [s for axis, s in enumerate(spacing_mm) if axis != plane]
    return up / across


def _to_grey(cut: np.ndarray) -> np.ndarray:
    """Scale intensities from the 0.5th and 99.5th percentile to [0, 1], so that outliers do not darken the rest."""
    if cut.ndim == 3:
        return np.clip(cut, 0, 1)
    low, high = np.percentile(cut, (0.5, 99.5))
    grey = np.clip((cut - low) / max(high - low, 1e-9), 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def _overlay(grey: np.ndarray, parts: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    colours = np.array([part_rgb(k) for k in range(int(parts.max()) + 1)])
    return (1 - opacity) * _to_grey(grey) + opacity * colours[parts.astype(int)]


def _show(axis, cut: np.ndarray, aspect: float) -> None:
    axis.imshow(_to_grey(cut), aspect=aspect, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)

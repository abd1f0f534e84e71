"""What is done with the parts that a network found: a region, smoothing, small pieces, a background."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from diffdiscover3d.data.formats.nifti.header import check_there
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import split, volume_sha256
from diffdiscover3d.errors import InputError

OUTSIDE = "outside the mask"
_MOST_SMOOTH = 100  # voxels; a wider filter makes a volume of ordinary size constant
_MOST_ROUNDS = 10  # of merging small pieces; two or three suffice for most maps


@dataclass(frozen=True)
class Finish:
    """Options of the same names of [`segment`]; nothing is done by default."""

    mask: Path | None = None
    smooth: float = 0.0
    min_size: int = 0
    background: int | None = None

    def __post_init__(self):
        if not 0 <= self.smooth <= _MOST_SMOOTH:
            raise ValueError(f"`smooth` must be in 0..{_MOST_SMOOTH} voxels, got {self.smooth}.")
        if self.min_size < 0:
            raise ValueError(f"`min_size` must be >= 0, got {self.min_size}.")
        if self.mask is not None and self.background is not None:
            raise ValueError("`background` cannot be given with `mask`, whose outside is the background.")

    @property
    def in_memory(self) -> bool:
        """Whether it needs the scan in memory as a whole."""
        return self.mask is not None or self.smooth > 0 or self.min_size > 0

    def recorded(self) -> dict:
        """Entries of the sidecar's arguments; empty if nothing is done."""
        found = {"smooth": self.smooth, "min_size": self.min_size} if self.smooth or self.min_size else {}
        if self.background is not None:
            found["background"] = self.background
        if self.mask is not None:
            check_there(split(self.mask)[0])
            found["mask"] = volume_sha256(self.mask)
        return found


def read_mask(path: Path, scan: NiftiVolume) -> np.ndarray:
    """A region on the grid of a scan: (H, W, D) bool, where the file is neither 0 nor NaN.

    Raises:
        InputError: if it cannot be read, is of another grid, or marks nothing.
    """
    found = read_volume(path, allow_constant=True, ignore_affine=True, nan_to_zero=True)
    if found.shape != scan.shape:
        raise InputError(f"{path}: has shape {found.shape}, the scan {scan.shape}; give a mask on the scan's grid.")
    if not np.allclose(found.affine[:3, :3], scan.affine[:3, :3], atol=1e-2 * min(scan.spacing_mm)):
        raise InputError(f"{path}: its voxels differ from the scan's in size or direction; give a mask of this scan.")
    mask = found.data != 0
    if not mask.any():
        raise InputError(f"{path}: marks no voxel; give a mask of the region to divide.")
    return mask


def bounding_box(mask: np.ndarray, least: int = 16) -> tuple[slice, slice, slice]:
    """The box around what a mask marks, widened to at least so many voxels where the volume has them."""
    box = []
    for axis, length in enumerate(mask.shape):
        places = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        start, stop = int(places[0]), int(places[-1]) + 1
        lacking = max(0, min(least, length) - (stop - start))
        start = max(0, start - lacking // 2)
        stop = min(length, max(stop, start + min(least, length)))
        box.append(slice(max(0, min(start, stop - min(least, length))), stop))
    return tuple(box)


def smoothed(soft: np.ndarray, sigma: float) -> np.ndarray:
    """(K, H, W, D) probabilities after a Gaussian filter of `sigma` voxels."""
    return np.stack([ndimage.gaussian_filter(part, sigma, mode="nearest") for part in soft])


def without_small_pieces(
    labels: np.ndarray, min_size: int, num_parts: int, parents: np.ndarray | None = None
) -> np.ndarray:
    """A label map whose pieces of fewer voxels have become part of what surrounds them.

    A piece is what is connected through voxel faces. Each voxel of a small one takes the number of the nearest voxel
    that belongs to none, in the same coarser part; this is repeated where the voxels that changed are small pieces
    again. Where all pieces of a coarser part are small, nothing changes.

    Args:
        labels: (H, W, D) part numbers.
        min_size: voxels of the smallest piece that stays.
        num_parts: number of parts.
        parents: (H, W, D) numbers of the coarser parts in which the parts are nested; default: one for all.
    """
    parents = np.zeros(labels.shape, np.uint8) if parents is None else parents
    for _ in range(_MOST_ROUNDS):
        merged = _merge_small_pieces(labels, min_size, num_parts, parents)
        if np.array_equal(merged, labels):
            break
        labels = merged
    return labels


def _merge_small_pieces(labels: np.ndarray, min_size: int, num_parts: int, parents: np.ndarray) -> np.ndarray:
    small = np.zeros(labels.shape, bool)
    for part in range(num_parts):
        pieces, count = ndimage.label(labels == part)
        if count:
            sizes = np.bincount(pieces.ravel(), minlength=count + 1)
            marked = sizes < min_size
            marked[0] = False
            small |= marked[pieces]
    found = labels.copy()
    for parent in np.unique(parents[small]):
        inside = parents == parent
        box = ndimage.find_objects(inside.astype(np.uint8))[0]
        lost, kept = (inside & small)[box], (inside & ~small)[box]
        if kept.any():
            nearest = ndimage.distance_transform_edt(~kept, return_distances=False, return_indices=True)
            found[box][lost] = labels[box][tuple(nearest)][lost]
    return found


def numbers_with_background(numbers: Sequence[int], background: int | None) -> np.ndarray:
    """The order of parts with one of them first.

    Args:
        numbers: (K,) the network's number of each part.
        background: the place in it of the part that becomes 0.

    Raises:
        ValueError: if there is no such part.
    """
    numbers = np.asarray(numbers)
    if background is None:
        return numbers
    if not 0 <= background < len(numbers):
        raise ValueError(f"`background` must be a part from 0 to {len(numbers) - 1}, got {background}.")
    return np.concatenate([numbers[[background]], np.delete(numbers, background)])

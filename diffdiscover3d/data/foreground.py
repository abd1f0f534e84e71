"""Foreground of a scan, robust intensity scaling inside it, and a standard frame around it.

All take torch tensors of shape (B, 1, H, W, D). The background is recognised by its value at the border of the volume,
not by zero: brain-extracted scans are also published z-scored or with another fill value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import InputError

LOW, HIGH = 0.05, 0.75  # robust scaling maps the two percentiles of the foreground to these values
_PERCENTILES = (0.01, 0.99)
_SHARE = 0.2  # one value in so many of the border voxels: the background was filled with it
_NOISE_LIMIT = 5.0  # otherwise: background voxels lie within so many standard deviations of the border's median
_SMALLEST = 0.01  # smallest share of the voxels that is accepted as a foreground
_SAMPLE = 1_000_000  # percentiles are taken from at most about so many voxels
_MARGIN = 0.03  # of the foreground's box, added on each side
_THIN = 0.01  # slices with less foreground than this share of the fullest slice do not extend the box


def find_foreground(volume: torch.Tensor) -> torch.Tensor:
    """Voxels that differ from the background, (B, 1, H, W, D) bool.

    The background value is the most frequent value on the six faces of a volume if it fills at least a fifth of them.
    Otherwise it is their median, and voxels within five robust standard deviations of it are background too. Where less
    than 1 % of a volume would be left, all of it is foreground.
    """
    masks = []
    for x in volume[:, 0]:
        border = _faces(x)
        value = border.mode().values
        if (border == value).float().mean() >= _SHARE:
            mask = x != value
        else:
            value = border.median()
            mask = (x - value).abs() > _NOISE_LIMIT * 1.4826 * (border - value).abs().median()
        masks.append(mask if mask.float().mean() >= _SMALLEST else torch.ones_like(mask))
    return torch.stack(masks)[:, None]


def robust_scale(volume: torch.Tensor, foreground: torch.Tensor | None = None, check: bool = True) -> torch.Tensor:
    """Scale intensities by percentiles of the foreground, so that single hot voxels do not matter.

    Args:
        volume: (B, 1, H, W, D), any intensities.
        foreground: mask of the same shape; default: [`find_foreground`].
        check: raise for volumes that cannot be scaled.

    Returns:
        0 in the background; in the foreground its 1st percentile becomes 0.05 and its 99th 0.75, linearly, clipped to
        [0.05, 1].

    Raises:
        InputError: if a volume holds NaN or Inf, or its foreground has no contrast.
    """
    if check and not torch.isfinite(volume).all():
        raise InputError("the volume holds NaN or Inf voxels; replace them before scaling.")
    if foreground is None:
        foreground = find_foreground(volume)
    limits = []
    for x, inside in zip(volume[:, 0], foreground[:, 0], strict=True):
        values = x[inside]
        values = values[:: max(1, len(values) // _SAMPLE)].float()
        if len(values) == 0:
            raise InputError("the volume has no foreground: all its voxels have one value.")
        ordered = values.sort().values
        limits.append(torch.stack([ordered[round(q * (len(ordered) - 1))] for q in _PERCENTILES]))
    low, high = torch.stack(limits).to(volume.dtype).unbind(dim=1)
    shape = (-1, 1, 1, 1, 1)
    if check and (high <= low).any():
        raise InputError("the foreground has no contrast: its 1st and 99th percentile are equal.")
    spread = (high - low).clamp(min=torch.finfo(volume.dtype).tiny).view(shape)
    scaled = (LOW + (HIGH - LOW) * (volume - low.view(shape)) / spread).clamp(LOW, 1.0)
    return torch.where(foreground, scaled, torch.zeros_like(scaled))


def looks_like_head(scaled: torch.Tensor, foreground: torch.Tensor) -> bool:
    """Whether a framed scan shows a whole head, and not a brain-extracted one.

    In a head, the skull below the skin is dark: the median intensity at a depth of 5 % to 10 % of the frame's shortest
    side is less than 0.6 of the median at depths over 14 %. In six brain-extracted FLAIR scans the ratio is 0.95 to
    1.05, in a whole head 0.3.

    Args:
        scaled: (1, 1, H, W, D), robustly scaled in its frame.
        foreground: bool mask of the same shape.
    """
    from scipy import ndimage

    volume = scaled[0, 0].float().cpu().numpy()
    depth = ndimage.distance_transform_edt(ndimage.binary_fill_holes(foreground[0, 0].cpu().numpy()))
    depth = depth / min(volume.shape)
    shell, inner = volume[(depth > 0.05) & (depth <= 0.1)], volume[depth > 0.14]
    if not len(shell) or not len(inner):
        return False
    return float(torch.from_numpy(shell).median()) < 0.6 * float(torch.from_numpy(inner).median())


@dataclass(frozen=True)
class Frame:
    """The box around a volume's foreground, brought to a fixed grid and back.

    Attributes:
        start, size: of the box in voxels; it may reach beyond the volume.
        shape: of the volume.
        grid: the fixed grid.
    """

    start: tuple[int, int, int]
    size: tuple[int, int, int]
    shape: tuple[int, int, int]
    grid: tuple[int, int, int]

    @classmethod
    def around(cls, foreground: torch.Tensor, grid: Sequence[int]) -> "Frame":
        """The frame of a (1, 1, H, W, D) foreground mask; slices with hardly any foreground do not extend it."""
        inside = foreground[0, 0]
        shape, start, size = tuple(inside.shape), [], []
        for axis in range(3):
            counts = inside.sum(dim=[a for a in range(3) if a != axis])
            kept = torch.nonzero(counts >= max(1.0, _THIN * float(counts.max())))
            first, last = (int(kept[0]), int(kept[-1])) if len(kept) else (0, shape[axis] - 1)
            margin = max(1, round(_MARGIN * (last - first + 1)))
            start.append(first - margin)
            size.append(last - first + 1 + 2 * margin)
        return cls(tuple(start), tuple(size), shape, tuple(grid))

    def crop(self, volume: torch.Tensor) -> torch.Tensor:
        """The box of a (1, C, H, W, D) volume, resampled to the grid; beyond the volume it is zero."""
        inside, before, after = self._overlap()
        part = volume[(slice(None), slice(None), *inside)]
        pad = [n for b, a in zip(reversed(before), reversed(after), strict=True) for n in (b, a)]
        return resize_volume(F.pad(part, pad), self.grid)

    def paste(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Bring (1, K, *grid) soft parts back to the volume's grid; outside of the box all is part 0."""
        soft = F.interpolate(probabilities, size=self.size, mode="trilinear", align_corners=False)
        inside, before, _ = self._overlap()
        used = tuple(slice(b, b + s.stop - s.start) for b, s in zip(before, inside, strict=True))
        out = soft.new_zeros((1, soft.shape[1], *self.shape))
        out[:, 0] = 1
        out[(slice(None), slice(None), *inside)] = soft[(slice(None), slice(None), *used)]
        return out

    def _overlap(self) -> tuple[tuple[slice, ...], tuple[int, ...], tuple[int, ...]]:
        """The box within the volume, and by how many voxels it exceeds the volume before and after each axis."""
        ends = [s + n for s, n in zip(self.start, self.size, strict=True)]
        inside = tuple(slice(max(0, s), min(n, e)) for s, e, n in zip(self.start, ends, self.shape, strict=True))
        before = tuple(max(0, -s) for s in self.start)
        after = tuple(max(0, e - n) for e, n in zip(ends, self.shape, strict=True))
        return inside, before, after


def _faces(x: torch.Tensor) -> torch.Tensor:
    """The values on the six faces of an (H, W, D) volume."""
    return torch.cat(
        [x[i].flatten() for i in (0, -1)]
        + [x[:, i].flatten() for i in (0, -1)]
        + [x[:, :, i].flatten() for i in (0, -1)]
    )

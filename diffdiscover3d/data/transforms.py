"""Volume transforms for training and inference, for torch tensors with three trailing spatial axes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffdiscover3d.errors import InputError


def min_max_normalize(volume: torch.Tensor, check: bool = True) -> torch.Tensor:
    """Scale each volume linearly to the range [0, 1].

    Args:
        volume: (..., H, W, D); minimum and maximum are computed over the three spatial axes.
        check: check for constant and non-finite volumes. The check synchronises with a GPU; disable it for volumes that
            have been checked before.

    Raises:
        InputError: if a volume is constant or contains NaN or Inf.
    """
    low = volume.amin(dim=(-3, -2, -1), keepdim=True)
    high = volume.amax(dim=(-3, -2, -1), keepdim=True)
    if not check:
        return (volume - low) / (high - low)
    if not torch.isfinite(high - low).all():
        raise InputError("the volume contains NaN or Inf voxels; replace them before normalising.")
    if (high <= low).any():
        raise InputError("the volume has no contrast: all voxels have the same value.")
    return (volume - low) / (high - low)


def moments_within(volume: torch.Tensor, within: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of (B, 1, H, W, D) volumes where `within` is 1, each (B, 1, 1, 1, 1)."""
    size = within.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1)
    mean = (volume * within).sum(dim=(2, 3, 4), keepdim=True) / size
    centred = (volume - mean) * within
    return mean, (centred.square().sum(dim=(2, 3, 4), keepdim=True) / size).sqrt()


def resize_volume(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Resample (B, C, H, W, D) volumes to `grid`, trilinearly, with Gaussian anti-aliasing when downsampling."""
    grid = tuple(grid)
    if tuple(volume.shape[2:]) == grid:
        return volume
    for axis, (old, new) in enumerate(zip(volume.shape[2:], grid, strict=True), start=2):
        if (sigma := anti_aliasing_sigma(old, new)) > 0:
            volume = _gaussian_along(volume, axis, sigma)
    return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)


def pad_to_multiple(volume: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad (B, C, H, W, D) at the far end of each axis to a multiple of `multiple`, replicating the border."""
    pad = [(-n) % multiple for n in volume.shape[2:]]
    if not any(pad):
        return volume
    return F.pad(volume, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")


def draw_flips(generator: torch.Generator) -> torch.Tensor:
    """Sample which of the three trailing axes to flip, each with probability 0.5: (3,) bool."""
    return torch.rand(3, generator=generator) < 0.5


def flip(volume: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Flip those of the three trailing axes for which `flips`, (3,) bool, is true."""
    axes = [axis for axis, flipped in zip((-3, -2, -1), flips.tolist(), strict=True) if flipped]
    return volume.flip(axes) if axes else volume


def anti_aliasing_sigma(old: int, new: int) -> float:
    """Standard deviation, in voxels, of the Gaussian filter before an axis of `old` voxels is resampled to `new`."""
    return max(0.0, (old / new - 1) / 2)


def gaussian_kernel(sigma: float, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """(2 * radius + 1,) weights with the sum 1; the radius is 4 standard deviations."""
    radius = max(1, round(4 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=dtype, device=device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return kernel / kernel.sum()


def _gaussian_along(volume: torch.Tensor, axis: int, sigma: float) -> torch.Tensor:
    kernel = gaussian_kernel(sigma, volume.dtype, volume.device)
    radius = len(kernel) // 2
    moved = volume.movedim(axis, -1)
    lines = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (radius, radius), mode="replicate")
    return F.conv1d(lines, kernel[None, None]).reshape(moved.shape).movedim(-1, axis)

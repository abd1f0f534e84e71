"""Transforms of volumes shared by training and inference; all take torch tensors with three trailing grid axes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffdiscover3d.errors import InputError


def min_max_normalize(volume: torch.Tensor, check: bool = True) -> torch.Tensor:
    """Map each volume's minimum to 0 and its maximum to 1.

    Args:
        volume: (..., H, W, D); the minimum and maximum are taken over the three grid axes.
        check: `False` for volumes that are known to be usable: looking at them makes the host wait for a GPU.

    Raises:
        InputError: if a volume is constant or holds NaN or Inf.
    """
    low = volume.amin(dim=(-3, -2, -1), keepdim=True)
    high = volume.amax(dim=(-3, -2, -1), keepdim=True)
    if not check:
        return (volume - low) / (high - low)
    if not torch.isfinite(high - low).all():
        raise InputError("the volume holds NaN or Inf voxels; replace them before normalising.")
    if (high <= low).any():
        raise InputError("the volume has no contrast: all its voxels have one value, so there is nothing to divide.")
    return (volume - low) / (high - low)


def resize_volume(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Resample (B, C, H, W, D) volumes to `grid`, trilinear, with a Gaussian against aliasing where it shrinks."""
    grid = tuple(grid)
    if tuple(volume.shape[2:]) == grid:
        return volume
    sigma = [max(0.0, (old / new - 1) / 2) for old, new in zip(volume.shape[2:], grid, strict=True)]
    for axis, s in enumerate(sigma, start=2):
        if s > 0:
            volume = _gaussian_along(volume, axis, s)
    return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)


def pad_to_multiple(volume: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad (B, C, H, W, D) at the far end of each axis to a multiple of `multiple`, repeating the border."""
    pad = [(-n) % multiple for n in volume.shape[2:]]
    if not any(pad):
        return volume
    return F.pad(volume, (0, pad[2], 0, pad[1], 0, pad[0]), mode="replicate")


def draw_flips(generator: torch.Generator) -> torch.Tensor:
    """Which of the three trailing axes to mirror, each with probability one half: (3,) bool."""
    return torch.rand(3, generator=generator) < 0.5


def flip(volume: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Mirror the three trailing axes where `flips`, (3,) bool, says so."""
    axes = [axis for axis, wanted in zip((-3, -2, -1), flips.tolist(), strict=True) if wanted]
    return volume.flip(axes) if axes else volume


def _gaussian_along(volume: torch.Tensor, axis: int, sigma: float) -> torch.Tensor:
    radius = max(1, round(4 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=volume.dtype, device=volume.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    moved = volume.movedim(axis, -1)
    lines = F.pad(moved.reshape(-1, 1, moved.shape[-1]), (radius, radius), mode="replicate")
    return F.conv1d(lines, kernel[None, None]).reshape(moved.shape).movedim(-1, axis)

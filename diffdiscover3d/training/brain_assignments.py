"""Training-free assignments: bright outliers of a brain, and scans with them smoothed away.

No label enters: the thresholds are multiples of a brain's own spread.
"""

import torch
import torch.nn.functional as F

from diffdiscover3d.models.brightness import brightness_evidence, robust_moments

__all__ = [
    "bright_outliers",
    "brightness_evidence",
    "conspicuous_outliers",
    "robust_moments",
    "smooth_away",
]

_CONSPICUOUS, _NEAR = 1.25, 0.15
_SEED, _GROW = 2.5, 2.0  # of lesions in a real scan: where they begin, and how far they extend
_SURFACE = 3  # voxels next to the brain's surface, where cortex and remnants are bright
_SMALLEST = 8  # voxels
_GRAIN = 0.3  # robust standard deviations


def conspicuous_outliers(rendering: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Voxels far brighter than any tissue, (B, 1, H, W, D) bool.

    Robust scaling keeps tissue in [0, 1]; outliers are above 1.25. After thresholding, one sweep of a Potts model gives
    voxels within 0.15 of the threshold the label of most of their 27 neighbours.

    Args:
        rendering: (B, 1, H, W, D) intensities.
        foreground: (B, 1, H, W, D) bool.
    """
    bright = ((rendering > _CONSPICUOUS) & foreground).float()
    around = F.avg_pool3d(bright, 3, stride=1, padding=1)
    near = (rendering - _CONSPICUOUS).abs() < _NEAR
    return torch.where(near, around > 0.5, bright > 0.5) & foreground


def bright_outliers(scan: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Bright, coherent regions deep in a brain, (1, 1, H, W, D) bool: the first assignment of a real scan.

    Voxels of the slightly smoothed scan more than 2 robust standard deviations above the median that are connected to
    one above 2.5, away from the surface of the brain, in components of at least 8 voxels.

    Args:
        scan, foreground: (1, 1, H, W, D), a robustly scaled scan in its frame and its mask.
    """
    from scipy import ndimage

    x = ndimage.gaussian_filter(scan[0, 0].float().cpu().numpy(), 0.7)
    inside = foreground[0, 0].cpu().numpy()
    median, spread = robust_moments(scan[foreground])
    deep = ndimage.binary_erosion(inside, iterations=_SURFACE)
    grown = (x > float(median + _GROW * spread)) & deep
    seeds = x > float(median + _SEED * spread)
    components, count = ndimage.label(grown)
    if count == 0:
        return torch.zeros_like(foreground)
    index = range(1, count + 1)
    kept = (ndimage.sum_labels(grown, components, index) >= _SMALLEST) & (ndimage.maximum(seeds, components, index) > 0)
    mask = ndimage.binary_fill_holes(torch.tensor([False, *kept.tolist()]).numpy()[components]) & inside
    return torch.from_numpy(mask)[None, None].to(foreground.device)


def smooth_away(scan: torch.Tensor, foreground: torch.Tensor, outliers: torch.Tensor) -> torch.Tensor:
    """A scan whose outliers are replaced by the ordinary tissue around them.

    Each outlier takes the mean of the tissue near it that is less than one robust standard deviation from the median,
    weighted by a Gaussian; the seam is blended over one voxel.

    Args:
        scan, foreground, outliers: (1, 1, H, W, D) of one scan in its frame.
    """
    from scipy import ndimage

    x = scan[0, 0].float().cpu().numpy()
    median, spread = (float(v) for v in robust_moments(scan[foreground]))
    wide = ndimage.binary_dilation(outliers[0, 0].cpu().numpy(), iterations=2) & foreground[0, 0].cpu().numpy()
    ordinary = (foreground[0, 0].cpu().numpy() & ~wide & (abs(x - median) < spread)).astype(float)
    weight = ndimage.gaussian_filter(ordinary, 4.0)
    mean = ndimage.gaussian_filter(ordinary * x, 4.0) / weight.clip(1e-6)
    grain = x - ndimage.gaussian_filter(x, 1.0)  # the scan's own grain stays, but not the edge of the outlier
    mean = mean + grain.clip(-_GRAIN * spread, _GRAIN * spread)
    # only what is brighter than its surroundings changes: fluid next to a lesion stays dark
    blend = ndimage.gaussian_filter((wide & (ndimage.gaussian_filter(x, 1.0) > mean)).astype(float), 0.7)
    out = x + blend * (mean.clip(0.05, 1.0) - x)
    return torch.from_numpy(out).to(scan)[None, None] * foreground

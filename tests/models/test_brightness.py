"""Log-odds from brightness, against formulas and lesions of known brightness."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffdiscover3d.models.brightness import (
    add_brightness,
    brightness_evidence,
    robust_moments,
    standardised_brightness,
    threshold_nearby,
)

SHAPE = (36, 30, 24)
INSIDE = torch.ones((1, 1, *SHAPE), dtype=torch.bool)


def half_space(first: int, last: int) -> torch.Tensor:
    mask = torch.zeros((1, 1, *SHAPE), dtype=torch.bool)
    mask[:, :, first:last] = True
    return mask


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn((1, 1, *SHAPE), generator=torch.Generator().manual_seed(seed))


def marked(log_odds: torch.Tensor, where: torch.Tensor) -> float:
    return float((log_odds > 0)[where].float().mean())


@pytest.mark.parametrize("options", [{}, {"rounds": 2, "ordinary": 0.0}, {"rounds": 0}, {"threshold": 1.0}])
def test_the_evidence_is_added_to_the_limited_logit(options):
    volume, logit = noise(), torch.linspace(-9, 9, INSIDE.numel()).reshape(INSIDE.shape)
    logit = logit - 6  # most of the volume stays ordinary
    threshold, tissue = options.get("threshold", 1.75), INSIDE
    expected = logit.clamp(-6, 6) + brightness_evidence(volume, INSIDE, threshold)
    for _ in range(options.get("rounds", 4)):
        tissue = expected <= options.get("ordinary", -4.0)
        assert tissue.float().mean() > 0.5
        expected = logit.clamp(-6, 6) + brightness_evidence(volume, tissue, threshold)
    torch.testing.assert_close(add_brightness(logit, volume, INSIDE, nearby=False, **options), expected)
    lowered = threshold_nearby(expected > 0, standardised_brightness(volume, tissue), INSIDE, threshold)
    expected = logit.clamp(-6, 6) + brightness_evidence(volume, tissue, lowered)
    torch.testing.assert_close(add_brightness(logit, volume, INSIDE, **options), expected)


def test_standardised_brightness_by_hand():
    volume = noise()[:, :, :5, :6, :7] + 4
    volume[0, 0, 0] = 90.0
    ordinary = volume < 90
    values = np.sort(volume[ordinary].numpy())
    median = values[(len(values) - 1) // 2]
    deviations = np.sort(np.abs(values - median))
    spread = 1.4826 * deviations[(len(values) - 1) // 2]
    torch.testing.assert_close(robust_moments(volume[ordinary]), (torch.tensor(median), torch.tensor(spread)))
    around = volume[0, 0, 1:4, 2:5, 3:6].mean()
    expected = (0.5 * volume[0, 0, 2, 3, 4] + 0.5 * around - median) / spread
    assert standardised_brightness(volume, ordinary)[0, 0, 2, 3, 4] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("brightness", "expected"), [(2.4, 1.2), (3.0, 1.5), (1.4, 1.0), (8.0, 1.75)])
def test_near_a_lesion_the_threshold_is_halfway_to_its_brightness(brightness, expected):
    found = half_space(0, 12)
    levels = torch.where(found, brightness, -0.3)
    lowered = threshold_nearby(found, levels, INSIDE)
    assert lowered.shape == INSIDE.shape and lowered.dtype == torch.float32
    assert torch.allclose(lowered[:, :, :14], torch.tensor(expected)), "inside and two voxels beyond"
    assert (lowered[:, :, 26:] == 1.75).all(), "a threshold far from the lesion changed"
    profile = lowered[0, 0, :, 10, 10]
    assert (profile.diff() >= -1e-6).all() and (lowered <= 1.75).all()


def test_two_lesions_have_a_threshold_each():
    found = half_space(0, 6) | half_space(30, 36)
    levels = torch.where(half_space(0, 6), 2.2, torch.where(found, 3.2, 0.0))
    lowered = threshold_nearby(found, levels, INSIDE)
    assert lowered[0, 0, 2, 5, 5] == pytest.approx(1.1, abs=1e-3)
    assert lowered[0, 0, 33, 5, 5] == pytest.approx(1.6, abs=1e-3)
    # against the formula, over the whole volume
    mask = found[0, 0].numpy().astype(float)
    share = ndimage.gaussian_filter(mask, 3.0, mode="constant")
    mean = ndimage.gaussian_filter(mask * levels[0, 0].numpy(), 3.0, mode="constant") / np.maximum(share, 1e-6)
    weight = np.minimum(share / 0.05, 1)
    expected = np.minimum(1.75, (1 - weight) * 1.75 + weight * np.clip(mean / 2, 1.0, 1.75))
    np.testing.assert_allclose(lowered[0, 0].numpy(), expected, atol=1e-4)


def test_small_components_do_not_lower_the_threshold():
    found = torch.zeros_like(INSIDE)
    found[0, 0, 3:6, 3:6, 3:6] = found[0, 0, 20:23, 20:23, 10:13] = True  # 27 voxels each; 0.2 % are 51.8
    assert (threshold_nearby(found, torch.full(INSIDE.shape, 2.0), INSIDE) == 1.75).all()
    found[0, 0, 6:9, 3:6, 3:6] = True  # 54 of them are connected
    lowered = threshold_nearby(found, torch.full(INSIDE.shape, 2.0), INSIDE)
    assert lowered[0, 0, 5, 4, 4] < 1.2 and lowered[0, 0, 21, 21, 11] == 1.75
    assert (threshold_nearby(found, torch.full(INSIDE.shape, 2.0), INSIDE & ~found) == 1.75).all(), "outside the brain"


def test_the_faint_rest_of_a_lesion_is_found():
    """Tissue of deviation 1 and a lesion 2.6 brighter, a third of which the network sees, the rest it doubts."""
    core, rest = half_space(0, 4), half_space(4, 10)
    volume, other = noise() + 2.6 * (core | rest), half_space(24, 36)
    prior = torch.where(core, 3.0, torch.where(rest, 0.0, -6.0))
    before, after = (add_brightness(prior, volume, INSIDE, nearby=nearby) for nearby in (False, True))
    assert marked(before, rest) < 0.9 < 0.96 < marked(after, rest)
    assert not ((before > 0) & ~(after > 0)).any(), "a marked voxel was lost"
    assert torch.equal(after[other], before[other]) and marked(after, half_space(12, 18)) == 0


def test_in_healthy_tissue_nothing_grows():
    for seed in range(4):
        volume = noise(seed)
        prior = torch.full_like(volume, -4.0)
        before, after = (add_brightness(prior, volume, INSIDE, nearby=nearby) for nearby in (False, True))
        assert torch.equal(before, after) and marked(after, INSIDE) < 0.002


@pytest.mark.parametrize("ordinary", [0.0, -4.0])
def test_a_large_lesion_does_not_hide_itself(ordinary):
    """Tissue of deviation 1, and 30 % of the brain 2.3 brighter; the network is sure of the core alone."""
    core, rim = half_space(0, 7), half_space(7, 11)
    volume = noise() + 2.3 * (core | rim)
    prior = torch.where(core, 4.0, torch.where(rim, 1.0, -5.0))
    once, again = (
        add_brightness(prior, volume, INSIDE, nearby=False, ordinary=ordinary, rounds=rounds) for rounds in (0, 4)
    )
    assert marked(once, rim) < 0.6 < 0.7 < marked(again, rim)
    assert marked(again, ~(core | rim)) < 0.02


def test_where_most_is_marked_nothing_is_left_to_compare_with():
    volume = noise()
    bright = torch.full_like(volume, 6.0)
    whole = 6 + brightness_evidence(volume, INSIDE)
    torch.testing.assert_close(add_brightness(bright, volume, INSIDE, nearby=False), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_decide_alike(dtype):
    core = half_space(0, 6)
    volume, prior = 0.5 + 0.05 * (noise() + 3 * core), torch.where(core, 2.0, -5.0)
    single = add_brightness(prior, volume, INSIDE)
    other = add_brightness(prior.to(dtype), volume.to(dtype), INSIDE)
    assert other.dtype == torch.float32 and ((other > 0) == (single > 0)).float().mean() > 0.998


def test_a_voxel_without_a_value_stays_alone():
    brightness, found = torch.where(half_space(10, 20), 4.0, 0.0), half_space(10, 20)
    expected = threshold_nearby(found, brightness, INSIDE)
    brightness[0, 0, 2, 2, 2] = np.inf
    torch.testing.assert_close(threshold_nearby(found, brightness, INSIDE), expected)

"""Transforms against torch and NumPy references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d

from diffdiscover3d.data.transforms import draw_flips, flip, min_max_normalize, pad_to_multiple, resize_volume
from diffdiscover3d.errors import InputError


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_min_max_of_each_volume_alone():
    volume = torch.cat([noise(1, 2, 5, 6, 7), 100 + 30 * noise(2, 2, 5, 6, 7, seed=1)])
    out = min_max_normalize(volume)
    for i in range(3):
        for c in range(2):
            x = volume[i, c].numpy()
            np.testing.assert_allclose(out[i, c].numpy(), (x - x.min()) / (x.max() - x.min()), atol=1e-6)
    assert torch.equal(out.amin(dim=(-3, -2, -1)), torch.zeros(3, 2))
    assert torch.equal(out.amax(dim=(-3, -2, -1)), torch.ones(3, 2))
    assert torch.equal(min_max_normalize(volume[0, 0]), out[0, 0])


def test_min_max_does_not_change_its_input():
    volume = noise(5, 6, 7)
    before = volume.clone()
    min_max_normalize(volume)
    assert torch.equal(volume, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_min_max_refuses_not_finite_voxels(value):
    volume = noise(2, 1, 4, 5, 6)
    volume[1, 0, 3, 4, 5] = value
    with pytest.raises(InputError, match=r"NaN or Inf.*replace"):
        min_max_normalize(volume)


def test_min_max_refuses_a_constant_volume_in_a_batch():
    volume = noise(2, 1, 4, 5, 6)
    volume[1] = 3
    with pytest.raises(InputError, match="no contrast"):
        min_max_normalize(volume)


def test_resize_to_the_same_grid_changes_nothing():
    volume = noise(1, 2, 5, 6, 7)
    assert torch.equal(resize_volume(volume, [5, 6, 7]), volume)


def test_enlarging_is_plain_trilinear():
    volume = noise(2, 3, 4, 5, 6)
    out = resize_volume(volume, (8, 7, 11))
    expected = F.interpolate(volume, size=(8, 7, 11), mode="trilinear", align_corners=False)
    assert torch.equal(out, expected)


def test_shrinking_smooths_each_shrunk_axis_first():
    volume = noise(1, 2, 24, 10, 15).double()
    grid = (6, 10, 9)  # shrunk by 4, kept, shrunk by 5/3
    smooth = volume.numpy()
    for axis, sigma in ((2, 1.5), (4, 1 / 3)):
        # the Gaussian is truncated at four standard deviations, with replicated borders
        smooth = gaussian_filter1d(smooth, sigma, axis=axis, mode="nearest", radius=max(1, round(4 * sigma)))
    expected = F.interpolate(torch.from_numpy(smooth), size=grid, mode="trilinear", align_corners=False)
    torch.testing.assert_close(resize_volume(volume, grid), expected)


def test_shrinking_does_not_alias():
    line = torch.tensor([0.0, 1.0]).repeat(16)
    volume = line[None, None, :, None, None].expand(1, 1, 32, 6, 9).contiguous()
    bare = F.interpolate(volume, size=(11, 6, 9), mode="trilinear", align_corners=False)
    smooth = resize_volume(volume, (11, 6, 9))
    assert smooth.shape == (1, 1, 11, 6, 9)
    assert bare.std() > 0.2 and smooth[:, :, 2:-2].std() < 0.1 * bare.std()
    assert abs(smooth.mean() - 0.5) < 0.02


def test_resize_keeps_constants_and_range():
    assert torch.allclose(resize_volume(torch.full((1, 1, 20, 9, 6), 0.7), (5, 3, 8)), torch.tensor(0.7))
    out = resize_volume(min_max_normalize(noise(1, 1, 20, 9, 13)), (5, 3, 17))
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 16, 9), (1, 3, 8), (8, 8, 16)])
def test_pad_repeats_the_far_border(shape):
    volume = noise(2, 3, *shape)
    out = pad_to_multiple(volume, 8)
    pads = [(0, 0), (0, 0)] + [(0, -n % 8) for n in shape]
    np.testing.assert_array_equal(out.numpy(), np.pad(volume.numpy(), pads, mode="edge"))
    assert all(n % 8 == 0 for n in out.shape[2:])


def test_flips_are_deterministic_and_cover_all_eight():
    volume = noise(1, 2, 3, 4, 5)
    first = [flip(volume, draw_flips(g)) for g in [torch.Generator().manual_seed(4)] for _ in range(200)]
    again = [flip(volume, draw_flips(g)) for g in [torch.Generator().manual_seed(4)] for _ in range(200)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    mirrored = {
        (x, y, z): volume.flip([a for a, on in zip((-3, -2, -1), (x, y, z), strict=True) if on])
        for x in (0, 1)
        for y in (0, 1)
        for z in (0, 1)
    }
    counts = dict.fromkeys(mirrored, 0)
    for out in first:
        (key,) = [k for k, v in mirrored.items() if torch.equal(out, v)]
        counts[key] += 1
    assert sum(counts.values()) == 200 and min(counts.values()) >= 10


def test_flips_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw_flips(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)

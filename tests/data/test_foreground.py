"""Foreground, robust scaling and frames, against formulas."""

import pytest
import torch

from diffdiscover3d.data.foreground import (
    HIGH,
    LOW,
    Frame,
    find_foreground,
    looks_like_head,
    robust_scale,
)
from diffdiscover3d.errors import InputError

SHAPE = (30, 34, 26)


def ball(radius: float = 9.0) -> torch.Tensor:
    """(1, 1, *SHAPE) bool, a ball away from the borders and from the centre."""
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in SHAPE], indexing="ij")
    return (sum((a - c) ** 2 for a, c in zip(axes, (14, 17, 12), strict=True)) < radius**2)[None, None]


def scan(fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    inside = ball()
    values = torch.rand((1, 1, *SHAPE), generator=torch.Generator().manual_seed(0)) * 100 + 20
    return torch.where(inside, values, torch.tensor(fill)), inside


@pytest.mark.parametrize("fill", [0.0, -3.0, 70.0])
def test_the_background_is_found_by_its_value_at_the_border(fill):
    volume, inside = scan(fill)
    assert torch.equal(find_foreground(volume), inside)


def test_a_noisy_background_is_found_by_its_spread():
    volume, inside = scan()
    noise = torch.randn(volume.shape, generator=torch.Generator().manual_seed(1))
    found = find_foreground(volume * 2 + noise)
    assert (found == inside).float().mean() > 0.999


def test_each_volume_of_a_batch_has_its_own_background():
    (first, inside), (second, _) = scan(), scan(-5.0)
    assert torch.equal(find_foreground(torch.cat([first, second])), torch.cat([inside, inside]))


def test_where_nothing_stands_out_all_is_foreground():
    volume = torch.rand((1, 1, *SHAPE), generator=torch.Generator().manual_seed(0))
    volume[0, 0, 5:10] = 100  # noise at the border, and most of it within its spread
    assert find_foreground(torch.full((1, 1, *SHAPE), 2.0)).all()


def test_robust_scaling_maps_percentiles_of_the_foreground():
    volume, inside = scan()
    scaled, values = robust_scale(volume, inside), volume[inside]
    ordered = values.sort().values
    low, high = ordered[round(0.01 * (len(values) - 1))], ordered[round(0.99 * (len(values) - 1))]
    expected = (LOW + (HIGH - LOW) * (values - low) / (high - low)).clamp(LOW, 1)
    torch.testing.assert_close(scaled[inside], expected)
    assert (scaled[~inside] == 0).all()


@pytest.mark.parametrize("change", [lambda v: 3 * v + 7, lambda v: v / 50 - 1])
def test_robust_scaling_does_not_depend_on_unit_or_offset(change):
    volume, inside = scan()
    torch.testing.assert_close(robust_scale(change(volume)), robust_scale(volume, inside), atol=1e-5, rtol=1e-5)


def test_one_hot_voxel_does_not_matter():
    volume, _ = scan()
    hot = volume.clone()
    hot[0, 0, 14, 17, 12] = 1e6
    difference = (robust_scale(hot) - robust_scale(volume)).abs()
    difference[0, 0, 14, 17, 12] = 0
    assert difference.max() < 0.005 and robust_scale(hot).max() == 1


def test_volumes_that_cannot_be_scaled_are_refused():
    volume, _ = scan()
    volume[0, 0, 14, 17, 12] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        robust_scale(volume)
    with pytest.raises(InputError, match="no contrast"):
        robust_scale(torch.where(ball(), 5.0, 0.0))


def test_a_frame_holds_the_foreground_and_goes_back():
    inside = ball()
    frame = Frame.around(inside, (48, 40, 56))
    cropped = frame.crop(inside.float())
    assert cropped.shape == (1, 1, 48, 40, 56) and cropped[..., 0, :, :].max() == 0
    # the box has the extent of the ball and a margin
    extent = [int(i.max() - i.min() + 1) for i in torch.nonzero(inside[0, 0]).T]
    assert all(e < n <= e + 6 for e, n in zip(extent, frame.size, strict=True))
    soft = torch.cat([1 - cropped, cropped], dim=1)
    back = frame.paste(soft)
    assert back.shape == (1, 2, *SHAPE)
    torch.testing.assert_close(back.sum(dim=1), torch.ones(1, *SHAPE))
    found = back[:, 1:] > 0.5
    assert 2 * (found & inside).sum() / (found.sum() + inside.sum()) > 0.97


def test_a_frame_reaches_beyond_a_volume_that_cuts_the_foreground():
    inside = ball()[:, :, 8:]
    frame = Frame.around(inside, (32, 32, 32))
    assert frame.start[0] < 0
    back = frame.paste(torch.cat([1 - frame.crop(inside.float()), frame.crop(inside.float())], dim=1))
    found = back[:, 1:] > 0.5
    assert back.shape[2:] == inside.shape[2:] and 2 * (found & inside).sum() / (found.sum() + inside.sum()) > 0.97


def test_stray_voxels_do_not_widen_a_frame():
    inside = ball()
    stray = inside.clone()
    stray[0, 0, 0, 0, 0] = stray[0, 0, -1, -1, -1] = True
    assert Frame.around(stray, (32, 32, 32)) == Frame.around(inside, (32, 32, 32))


def test_a_head_has_a_dark_layer_below_its_skin():
    head, skull, brain = ball(12.0), ball(11.0), ball(9.0)
    values = torch.where(brain, 0.5, torch.where(skull, 0.1, 0.7)) * head
    assert looks_like_head(values, head)
    assert not looks_like_head(torch.where(brain, 0.5, 0.0), brain)

"""The losses against Eq. 5 to 8 written down directly."""

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.losses import interpolation_matrix, photometric_invariance, region_consistency


def eq5(masks, features, extent=None):
    """Eq. 5 as in the paper: upsample, average, square, sum."""
    grid = masks.shape[2:]
    h = F.interpolate(features, size=tuple(extent or grid), mode="trilinear", align_corners=True)
    h = h[..., : grid[0], : grid[1], : grid[2]]
    total = 0
    for k in range(masks.shape[1]):
        m = masks[:, k : k + 1]
        z = (m * h).sum(dim=(2, 3, 4), keepdim=True) / m.sum(dim=(2, 3, 4), keepdim=True)
        total = total + (m * (z - h) ** 2).sum(dim=(1, 2, 3, 4))
    return (total / (grid[0] * grid[1] * grid[2])).mean()


def random_masks(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).softmax(dim=1)


CASES = [
    # masks' grid, features' grid, extent
    ((10, 7, 9), (3, 4, 2), None),
    ((10, 7, 9), (2, 1, 3), (12, 8, 12)),
    ((6, 5, 4), (6, 5, 4), None),
    ((6, 5, 4), (6, 5, 4), (6, 6, 4)),
    ((9, 4, 6), (1, 1, 1), None),
    ((6, 5, 4), (8, 3, 9), None),  # finer than the voxels along two axes, as thin scans have it
]


@pytest.mark.parametrize(("grid", "coarse", "extent"), CASES)
def test_value_and_gradient_equal_eq5(grid, coarse, extent):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, *grid, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 5, *coarse, dtype=torch.float64) + 3
    ours, direct = (f(logits.softmax(dim=1), features, extent) for f in (region_consistency, eq5))
    torch.testing.assert_close(ours, direct, rtol=1e-12, atol=1e-14)
    # gradients through the softmax, i.e. on the simplex of the masks
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, direct)), rtol=1e-9, atol=1e-15)


def test_several_stages_count_as_their_concatenation():
    torch.manual_seed(1)
    masks = random_masks(2, 3, 8, 6, 10)
    stages = [torch.randn(2, 4, 2, 2, 3, dtype=torch.float64), torch.randn(2, 2, 4, 3, 5, dtype=torch.float64)]
    upsampled = [F.interpolate(f, size=(8, 6, 10), mode="trilinear", align_corners=True) for f in stages]
    torch.testing.assert_close(region_consistency(masks, stages), eq5(masks, torch.cat(upsampled, dim=1)))


@pytest.mark.parametrize(("grid", "coarse", "extent"), CASES[:4])
def test_relative_is_the_share_of_variance_left(grid, coarse, extent):
    torch.manual_seed(2)
    masks, features = random_masks(1, 3, *grid), torch.randn(1, 4, *coarse, dtype=torch.float64) - 5
    everything = torch.ones(1, 1, *grid, dtype=torch.float64)
    expected = eq5(masks, features, extent) / eq5(everything, features, extent)
    torch.testing.assert_close(region_consistency(masks, features, extent, relative=True), expected)
    torch.testing.assert_close(
        region_consistency(everything, features, extent, relative=True), torch.tensor(1.0, dtype=torch.float64)
    )


def test_relative_of_features_without_variance_is_small_and_finite():
    masks = random_masks(1, 3, 6, 5, 4, dtype=torch.float32)
    for features in (torch.zeros(1, 2, 3, 3, 2), torch.full((1, 2, 3, 3, 2), 0.7)):
        value = region_consistency(masks, features, relative=True)
        assert torch.isfinite(value) and abs(value) <= 1.01


def test_perfect_parts_leave_nothing():
    labels = torch.randint(0, 3, (1, 6, 5, 7))
    masks = F.one_hot(labels, 3).movedim(-1, 1).double()
    features = labels[:, None].double() * 2 + 1
    assert abs(region_consistency(masks, features)) < 1e-12


def test_an_empty_part_gives_no_nan():
    masks = torch.zeros(1, 3, 5, 4, 6)
    masks[:, 0] = 1
    masks.requires_grad_()
    loss = region_consistency(masks, torch.randn(1, 2, 3, 2, 3))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(masks.grad).all()


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_float32_survives_a_large_mean(offset):
    torch.manual_seed(3)
    masks = random_masks(2, 4, 12, 10, 11)
    features = torch.randn(2, 16, 4, 5, 3, dtype=torch.float64) + offset
    exact = eq5(masks, features)
    ours = region_consistency(masks.float(), features.float())
    # the only error is the float32 rounding of the features
    rounding = 1e-5 + 4 * offset * torch.finfo(torch.float32).eps
    assert abs(ours - exact) / exact < rounding


def test_bfloat16_features_and_autocast():
    torch.manual_seed(4)
    masks, features = random_masks(1, 3, 8, 9, 7, dtype=torch.float32), torch.randn(1, 6, 4, 3, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = region_consistency(masks, features)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, eq5(masks, features.float()), rtol=1e-5, atol=1e-6)


def test_interpolation_matrix_is_torch_interpolate():
    line = torch.randn(1, 1, 5, dtype=torch.float64)
    expected = F.interpolate(line, size=13, mode="linear", align_corners=True)[0, 0, :11]
    torch.testing.assert_close(interpolation_matrix(5, 13, 11, line.device, line.dtype) @ line[0, 0], expected)


@pytest.mark.parametrize(
    ("masks", "features", "extent", "message"),
    [
        ((1, 2, 4, 4, 4), (2, 1, 2, 2, 2), None, "for 1 volumes"),
        ((1, 2, 4, 4, 4), (1, 1, 2, 2, 2), (4, 3, 4), "extent"),
        ((1, 2, 4, 4, 4), (1, 2, 2, 2), None, "must be"),
    ],
)
def test_bad_shapes_are_named(masks, features, extent, message):
    with pytest.raises(ValueError, match=message):
        region_consistency(torch.rand(masks), torch.rand(features), extent)


def test_no_features_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        region_consistency(torch.rand(1, 2, 3, 3, 3), [])


def test_invariance_by_hand():
    # one volume of two voxels, two parts: 1 - 2 (.8*.6 + .2*.4 + .5*.5 + .5*.5) / (.68 + .5 + .52 + .5)
    a = torch.tensor([[0.8, 0.5], [0.2, 0.5]]).reshape(1, 2, 2, 1, 1)
    b = torch.tensor([[0.6, 0.5], [0.4, 0.5]]).reshape(1, 2, 2, 1, 1)
    torch.testing.assert_close(photometric_invariance(a, b), torch.tensor(1 - 2 * 1.06 / 2.2))
    assert abs(photometric_invariance(a, a)) < 1e-6
    # averaged over volumes instead of pooled, so that all volumes have equal weight
    both = photometric_invariance(torch.cat([a, a]), torch.cat([b, a]))
    torch.testing.assert_close(both, torch.tensor((1 - 2 * 1.06 / 2.2) / 2))


def test_invariance_refuses_different_shapes():
    with pytest.raises(ValueError, match="same shape"):
        photometric_invariance(torch.rand(1, 2, 3, 3, 3), torch.rand(1, 3, 3, 3, 3))


def test_share_of_what_coarser_parts_leave():
    """Against the ratio of two direct sums of Eq. 5, with soft parts that divide hard ones."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (2, 6, 5, 7))
    within = torch.nn.functional.one_hot(labels, 2).movedim(-1, 1).double()
    inner = torch.rand(2, 3, 6, 5, 7, dtype=torch.float64).softmax(dim=1)
    masks = torch.cat([within[:, :1], within[:, 1:] * inner], dim=1)
    h = torch.randn(2, 4, 6, 5, 7, dtype=torch.float64)

    def direct(m, b):
        total = 0
        for k in range(m.shape[1]):
            weight = m[b, k]
            if weight.sum() > 0:
                mean = (h[b] * weight).sum(dim=(1, 2, 3)) / weight.sum()
                total += (weight * (h[b] - mean[:, None, None, None]).square().sum(dim=0)).sum()
        return total

    expected = torch.stack([direct(masks, b) / direct(within, b) for b in range(2)]).mean()
    found = region_consistency(masks, h, relative=True, within=within)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert region_consistency(within, h, relative=True, within=within).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="`relative` is False"):
        region_consistency(masks, h, within=within)

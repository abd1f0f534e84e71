"""Spatial consistency, smoothness and the loss against assigned parts, against their definitions in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.losses import assignment_loss, smoothness, spatial_consistency

GRID, SPACING = (5, 7, 4), (1.0, 0.5, 3.0)


def random_masks(parts=4, batch=2, grid=GRID):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, parts, *grid, dtype=torch.float64, generator=generator).softmax(dim=1)


def positions(grid, spacing):
    axes = [torch.arange(n, dtype=torch.float64) * s for n, s in zip(grid, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def spread_of(mask, position):
    centre = (mask * position).sum(dim=(1, 2, 3)) / mask.sum()
    return (mask * (position - centre[:, None, None, None]).square().sum(dim=0)).sum()


@pytest.mark.parametrize("families", [[(1, 2)], [(0, 2, 3)], [(0, 3), (1, 2)]])
def test_spatial_consistency_is_eq5_of_the_positions(families):
    masks, position = random_masks(), positions(GRID, SPACING)
    shares = [
        sum(spread_of(volume[k], position) for k in family) / spread_of(volume[list(family)].sum(dim=0), position)
        for family in families
        for volume in masks
    ]
    found = spatial_consistency(masks, families, SPACING)
    torch.testing.assert_close(found, torch.stack(shares).mean(), rtol=1e-12, atol=0)
    assert 0 < found < 1 and spatial_consistency(masks.float(), families, SPACING).dtype == torch.float32


def test_spatial_consistency_has_the_gradient_of_its_definition():
    masks = random_masks(3, batch=1, grid=(3, 4, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: spatial_consistency(m, [(0, 2)], SPACING), masks)


def test_compact_parts_cost_less_and_empty_ones_nothing():
    masks = torch.zeros(1, 3, 12, 6, 6, dtype=torch.float64)
    masks[:, 1, :4], masks[:, 2, 8:], masks[:, 0, 4:8] = 1, 1, 1
    mixed = masks.clone()
    mixed[:, 1], mixed[:, 2] = (masks[:, 1] + masks[:, 2]) / 2, (masks[:, 1] + masks[:, 2]) / 2
    assert spatial_consistency(masks, [(1, 2)]) < 0.5 * spatial_consistency(mixed, [(1, 2)])
    empty = torch.zeros(1, 3, 4, 4, 4, dtype=torch.float64)
    empty[:, 0] = 1
    empty.requires_grad_()
    loss = spatial_consistency(empty, [(1, 2)])
    loss.backward()
    assert loss == 0 and torch.isfinite(empty.grad).all()
    with pytest.raises(ValueError, match="at least two parts"):
        spatial_consistency(masks, [(1,)])


def test_anisotropic_voxels_count_in_mm():
    """Parts stacked along a thick axis are farther apart than along a thin one."""
    masks = torch.zeros(1, 2, 4, 4, 4, dtype=torch.float64)
    masks[:, 0, :2], masks[:, 1, 2:] = 1, 1
    thick, thin = (spatial_consistency(masks, [(0, 1)], (s, 1.0, 1.0)) for s in (4.0, 0.25))
    assert thick < thin


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
def test_smoothness_is_the_expected_potts_energy(spacing):
    """The expectation over independent draws of the parts, by summing over all pairs of parts of all neighbours."""
    masks = random_masks(3, grid=(3, 4, 2))
    areas = [math.prod(spacing) / s for s in spacing]
    energy, total = 0.0, 0.0
    for place in itertools.product(*map(range, masks.shape[2:])):
        for axis in range(3):
            other = list(place)
            other[axis] += 1
            if other[axis] < masks.shape[2 + axis]:
                u, v = masks[(..., *place)], masks[(..., *other)]
                differ = sum(u[:, a] * v[:, b] for a in range(3) for b in range(3) if a != b)
                energy, total = energy + areas[axis] * differ, total + areas[axis]
    torch.testing.assert_close(smoothness(masks, spacing), (energy / total).mean(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda m: smoothness(m, spacing), masks[:1].clone().requires_grad_())


def test_smoothness_counts_the_faces_of_a_box():
    masks = torch.zeros(1, 2, 8, 9, 10)
    masks[:, 1, 2:5, 3:7, 4:6] = 1
    masks[:, 0] = 1 - masks[:, 1]
    faces = 2 * (3 * 4 + 4 * 2 + 3 * 2)
    pairs = 7 * 9 * 10 + 8 * 8 * 10 + 8 * 9 * 9
    torch.testing.assert_close(smoothness(masks), torch.tensor(faces / pairs))


def test_assignment_loss_is_cross_entropy_and_dice():
    logits = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (2, *GRID), generator=torch.Generator().manual_seed(1))
    one_hot, probs = F.one_hot(labels, 3).movedim(-1, 1), logits.softmax(dim=1)
    overlap, sizes = (one_hot * probs).sum(dim=(2, 3, 4)), (one_hot + probs).sum(dim=(2, 3, 4))
    expected = F.cross_entropy(logits, labels) + (1 - (2 * overlap + 1) / (sizes + 1)).mean()
    torch.testing.assert_close(assignment_loss(logits, labels, [(0, 1, 2)]), expected)


def test_siblings_of_one_kind_have_no_order():
    labels = torch.randint(3, (2, *GRID), generator=torch.Generator().manual_seed(1))
    right = 20.0 * F.one_hot(labels, 3).movedim(-1, 1).float()
    swapped = right.clone()
    swapped[1] = right[1, [0, 2, 1]]  # in one volume only
    assert assignment_loss(swapped, labels, [(0, 1, 2)]) > 1
    assert assignment_loss(swapped, labels, [(0, 1, 2)], interchangeable=True) < 1e-3
    around = right[:, [1, 0, 2]]  # the part that surrounds the others is not one of them
    assert assignment_loss(around, labels, [(0, 1, 2)], interchangeable=True) > 1


def test_structures_count_apart_and_ignored_voxels_not_at_all():
    """Two structures, logits minus infinity across; one voxel ignored; one structure absent from a volume."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2, *GRID), generator=generator)
    labels[0, :, 3:] += 2
    outside = torch.zeros(2, 4, *GRID, dtype=torch.bool)
    outside[0, 2:, :, :3], outside[0, :2, :, 3:], outside[1, 2:] = True, True, True
    logits = torch.randn(2, 4, *GRID, generator=generator).masked_fill(outside, -torch.inf).requires_grad_()
    loss = assignment_loss(logits, labels, [(0, 1), (2, 3)])
    alone = [
        assignment_loss(logits[:1, :2, :, :3], labels[:1, :, :3], [(0, 1)]),
        assignment_loss(logits[:1, 2:, :, 3:], labels[:1, :, 3:] - 2, [(0, 1)]),
        assignment_loss(logits[1:, :2], labels[1:], [(0, 1)]),
        torch.zeros(()),
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    loss.backward()
    assert torch.isfinite(logits.grad[~outside]).all() and (logits.grad[~outside] != 0).any()
    labels[0, 0, 0, 0] = 255
    changed = logits.detach().clone()
    changed[0, 0, 0, 0, 0] += 3
    ignored = [assignment_loss(x, labels, [(0, 1), (2, 3)]) for x in (logits.detach(), changed)]
    torch.testing.assert_close(*ignored)

"""The labels a method is given, and the losses that use no others."""

import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.baselines.supervision import (
    HIDDEN,
    LimitedLabels,
    best_numbering_loss,
    class_weights,
    numberings,
    sparse_cross_entropy,
)
from tests.baselines.toys import GRID, many_halves


def limited(amount, count=6, **options):
    volumes = many_halves(count)
    return volumes, LimitedLabels(volumes, lambda i: volumes[i]["labels"], amount, **options)


def test_a_method_without_labels_gets_none():
    def never(index):
        raise AssertionError("labels were read")

    volumes = LimitedLabels(many_halves(3), never, "none")
    assert volumes.share() == 0 and all("labels" not in volumes[i] for i in range(3))


def test_one_slice_of_each_volume():
    volumes, found = limited("slice", seed=2)
    for i in range(6):
        given = found[i]["labels"] != HIDDEN
        axis = i % 3
        assert given.sum() == given.numel() / GRID[axis]
        planes = given.flatten() if axis == 0 else given.movedim(axis, 0)
        assert planes.reshape(GRID[axis], -1).all(dim=1).sum() == 1
        assert torch.equal(found[i]["labels"][given], volumes[i]["labels"][given])
    assert found.share() == pytest.approx((1 / 20 + 1 / 24 + 1 / 16) / 3)
    again = limited("slice", seed=2)[1]
    assert all(torch.equal(found[i]["labels"], again[i]["labels"]) for i in range(6))
    assert any(not torch.equal(found[i]["labels"], limited("slice", seed=3)[1][i]["labels"]) for i in range(6))


def test_a_slice_of_a_synthetic_cell_is_two_percent():
    volumes = [{"volume": torch.zeros(1, 50, 50, 50), "name": str(n)} for n in range(3)]
    assert LimitedLabels(volumes, lambda i: torch.zeros(50, 50, 50), "slice").share() == pytest.approx(0.02)


def test_one_volume_or_all():
    volumes, found = limited("volume", seed=1)
    given = [bool((found[i]["labels"] != HIDDEN).any()) for i in range(6)]
    assert sum(given) == 1 and given[found.labelled_volume] and found.share() == pytest.approx(1 / 6)
    assert torch.equal(found[found.labelled_volume]["labels"], volumes[found.labelled_volume]["labels"])
    assert limited("all")[1].share() == 1
    with pytest.raises(ValueError, match="`amount` must be one of"):
        limited("half")
    with pytest.raises(IndexError):
        found[6]


def test_sparse_cross_entropy_ignores_hidden_labels():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 3, requires_grad=True)
    labels = torch.randint(3, (2, 4, 5, 3))
    labels[:, 1:] = HIDDEN
    weights = torch.tensor([0.5, 1.0, 3.0])
    loss = sparse_cross_entropy(logits, labels, weights)
    for i in range(2):  # PyTorch's own weighted mean over the labelled plane alone
        expected = F.cross_entropy(logits[i : i + 1, :, 0], labels[i : i + 1, 0], weights)
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-5)
    loss.sum().backward()
    assert (logits.grad[:, :, 1:] == 0).all() and (logits.grad[:, :, 0] != 0).all()
    assert sparse_cross_entropy(logits, torch.full_like(labels, HIDDEN), weights).tolist() == [0, 0]


def test_exchangeable_parts_may_have_either_number():
    assert len(numberings(8)) == 4 and len(numberings(4)) == 1
    torch.manual_seed(0)
    labels = torch.randint(8, (2, 3, 4, 5))
    labels[:, 0] = HIDDEN
    swapped = labels.clone()
    swapped[labels == 4], swapped[labels == 5] = 5, 4
    logits = 9.0 * F.one_hot(labels.clamp(min=0), 8).movedim(-1, 1)

    def loss(y):
        return sparse_cross_entropy(logits, y, torch.ones(8))

    right = best_numbering_loss(loss, labels, 8)
    assert best_numbering_loss(loss, swapped, 8).item() == pytest.approx(right.item())
    wrong = swapped.clone()
    wrong[labels == 2], wrong[labels == 3] = 3, 2  # a vesicle is no mitochondrion
    assert best_numbering_loss(loss, wrong, 8) > right + 1


def test_class_weights_by_hand():
    labels = torch.full((10, 10, 1), HIDDEN)
    labels[:, 0], labels[:, 1:5] = 1, 0  # 10 and 40 voxels: weights 1/√10 and 1/√40, so 2 : 1
    weights = class_weights([{"labels": labels}], 3)
    assert weights[1] / weights[0] == pytest.approx(2) and weights[2] == 0
    assert (40 * weights[0] + 10 * weights[1]) / 50 == pytest.approx(1)

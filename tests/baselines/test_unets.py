"""U-Nets from a few labels and from all of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.baselines.cicek import Cicek, cut, draw_labelled, label_in_windows
from diffdiscover3d.baselines.jiang import CascadedUNet, Jiang, soft_dice_losses
from diffdiscover3d.baselines.supervision import HIDDEN, LimitedLabels
from diffdiscover3d.evaluation.metrics import dice_matrix, matched_dice
from tests.baselines.toys import halves, many_halves


def labelled(amount, count=4):
    volumes = many_halves(count, noise=0.2)
    return LimitedLabels(volumes, lambda i: volumes[i]["labels"], amount)


@pytest.mark.parametrize(
    ("method", "amount"),
    [
        (Cicek(2, steps=40, crop=16, learning_rate=5e-3, channels=(8, 8, 16)), "slice"),
        (Jiang(2, steps=25, crop=16, learning_rate=5e-3), "all"),
    ],
)
def test_labels_are_learned(method, amount):
    method.fit(labelled(amount))
    new = halves(0.2, number=13)
    found = method.predict(new["volume"])
    assert found.shape == tuple(new["labels"].shape) and found.dtype == np.uint8
    assert matched_dice(dice_matrix(found, new["labels"].numpy(), 2, 2)) > 0.9


def test_cubes_and_their_labels_stay_together():
    volume = torch.rand(1, 9, 7, 5)
    item = {"volume": volume, "labels": (volume[0] > 0.5).long(), "name": ""}
    torch.manual_seed(0)
    x, y = draw_labelled([item], 12, 6, max_gamma=1.0)
    assert x.shape == (12, 1, 6, 6, 6) and y.shape == (12, 6, 6, 6)
    given = y != HIDDEN  # the volume is one voxel thinner than the cube
    assert torch.equal((x[:, 0] > 0.5).long()[given], y[given])
    assert given.flatten(1).sum(dim=1).tolist() == [6 * 6 * 5] * 12
    assert len({tuple(v.flatten().tolist()) for v in x}) > 6  # they differ
    cube, _ = cut(volume, item["labels"], 4)
    assert cube.shape == (1, 4, 4, 4)


def test_soft_dice_by_hand_and_without_hidden_labels():
    logits = torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1, 1).repeat(1, 1, 2, 3, 1)
    labels = torch.zeros(1, 2, 3, 1, dtype=torch.int64)
    labels[:, 1] = 1
    p, q = (F.softmax(torch.tensor([2.0, 0.0]), dim=0)).tolist()
    # three voxels of each part: dice = 2·3p / (6p² + 3) and 2·3q / (6q² + 3)
    expected = 1 - (6 * p / (6 * p * p + 3) + 6 * q / (6 * q * q + 3)) / 2
    assert soft_dice_losses(logits, labels).item() == pytest.approx(expected, rel=1e-4)
    logits.requires_grad_()
    labels[:, :, 2] = HIDDEN
    soft_dice_losses(logits, labels).sum().backward()
    assert (logits.grad[:, :, :, 2] == 0).all() and (logits.grad[:, :, :, 0] != 0).all()


def test_the_cascade_has_three_outputs_and_the_second_stage_sees_the_first():
    torch.manual_seed(0)
    network = CascadedUNet((8, 16), 3).eval()
    x = torch.rand(1, 1, 16, 24, 8)
    with torch.no_grad():
        coarse, fine, second = network.stages(x)
        assert coarse.shape == fine.shape == second.shape == (1, 3, 16, 24, 8)
        assert torch.equal(network(x), fine)
        network.coarse.conv_final[2].conv.bias += torch.tensor([5.0, 0, -5.0])
        assert not torch.equal(network(x), fine)
    used = {name for name, p in network.named_parameters() if p.requires_grad}
    network.train()
    sum(out.square().mean() for out in network.stages(x)).backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == used  # nothing idle


@pytest.mark.parametrize("shape", [(20, 17, 16), (12, 30, 9)])
def test_windows_of_the_trainings_size_label_a_volume(shape):
    """The network sees cubes of 16 voxels only, and zeros only where a side is shorter than that."""
    seen = []

    def network(x):
        assert x.shape[2:] == (16, 16, 16)
        seen.append(x)
        return torch.cat([0.5 - x, x - 0.5], dim=1)

    volume = 0.1 + 0.9 * torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    found = label_in_windows(network, volume, 16, torch.device("cpu"))
    np.testing.assert_array_equal(found, (volume[0] > 0.5).numpy())
    zeros = (torch.cat(seen) == 0).any()
    assert bool(zeros) == (min(shape) < 16)

"""The mutual information of shifted segmentations, against a count by hand."""

import math

import pytest
import torch

from diffdiscover3d.baselines.iic import IIC, draw_slices, shifted_mutual_information
from tests.baselines.toys import many_halves


def direct(first: torch.Tensor, second: torch.Tensor, max_shift: int) -> torch.Tensor:
    """The definition, pixel by pixel."""
    _, k, height, width = first.shape
    found = []
    for dy in range(-max_shift, max_shift + 1):
        for dx in range(-max_shift, max_shift + 1):
            joint = torch.zeros(k, k, dtype=first.dtype)
            for y in range(height):
                for x in range(width):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        joint += first[:, :, y, x].T @ second[:, :, y + dy, x + dx]
            joint = (joint + joint.T) / (2 * joint.sum())
            outer = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
            found.append((joint * (joint / outer).log()).sum())
    return torch.stack(found).mean()


def test_mutual_information_is_its_definition():
    torch.manual_seed(0)
    first, second = (torch.randn(2, 3, 6, 8).mul(3).softmax(dim=1).requires_grad_() for _ in range(2))
    found = shifted_mutual_information(first, second, 2)
    expected = direct(first, second, 2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(found, (first, second)), torch.autograd.grad(expected, (first, second)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_mutual_information_of_equal_and_unrelated_parts():
    parts = torch.zeros(1, 2, 4, 6)
    parts[:, 0, :, ::2], parts[:, 1, :, 1::2] = 1, 1
    assert shifted_mutual_information(parts, parts, 0).item() == pytest.approx(math.log(2), rel=1e-4)
    rows = torch.zeros(1, 2, 4, 6)
    rows[:, 0, ::2], rows[:, 1, 1::2] = 1, 1  # stripes across: each says nothing about the other
    assert shifted_mutual_information(parts, rows, 0).item() == pytest.approx(0, abs=1e-5)


def test_training_raises_the_information(tmp_path):
    volumes = many_halves(4)
    methods = [IIC(2, steps=steps, batch_size=4, max_shift=2, heads_alternate=2) for steps in (1, 60)]
    found = []
    for method in methods:
        method.fit(volumes)
        torch.manual_seed(1)
        with torch.no_grad():
            parts = method.network(draw_slices(volumes, 8))
        found.append(shifted_mutual_information(parts, parts, 2).item())
    assert found[1] > found[0] + 0.1


def test_slices_keep_their_place():
    volume = torch.rand(1, 6, 8, 5)
    torch.manual_seed(0)
    slices = draw_slices([{"volume": volume}], 7)
    assert slices.shape == (7, 1, 6, 8)
    assert all(any(torch.equal(s[0], volume[0, :, :, d]) for d in range(5)) for s in slices)


def test_paper_preset_is_the_published_trunk():
    config = IIC(2, preset="paper").config
    assert config.channels == (64, 128, None, 256, 256, 512, 512) and config.max_shift == 10

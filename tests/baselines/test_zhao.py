"""Registration that recovers a known flow, and the labelled volumes made from one."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffdiscover3d.baselines.supervision import LimitedLabels
from diffdiscover3d.baselines.zhao import TransformNetworks, Zhao, gradient_penalty
from diffdiscover3d.errors import InputError
from tests.baselines.toys import halves, many_halves

GRID = (24, 20, 16)


def textured(seed: int = 0) -> np.ndarray:
    found = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(GRID), 1.5)
    return ((found - found.min()) / (found.max() - found.min())).astype(np.float32)


def item(values: np.ndarray, name: str) -> dict:
    labels = torch.from_numpy((values > 0.5).astype(np.int64))
    return {"volume": torch.from_numpy(values)[None], "labels": labels, "name": name}


def test_registration_recovers_a_known_flow():
    atlas = textured()
    moved = np.roll(atlas, (0, 2, 0), axis=(0, 1, 2))
    volumes = [item(atlas, "atlas"), item(moved, "moved")]
    method = Zhao(2, registration_steps=80, learning_rate=5e-3, bf16=False, lambda_flow=0.1)
    transforms = method.seeded(lambda: TransformNetworks(method.config))
    atlas_tensor, target = (v["volume"][None] for v in volumes)
    method._learn_shapes(transforms, [volumes[1]], atlas_tensor, None)
    with torch.no_grad():
        flow = transforms.flow(transforms.velocity(atlas_tensor, target))[0, :, 4:-4, 4:-4, 4:-4]
    # the target at v is the atlas two voxels before
    assert flow[1].mean().item() == pytest.approx(-2, abs=0.4)
    assert abs(flow[0].mean()) < 0.3 and abs(flow[2].mean()) < 0.3


def test_the_inverse_flow_undoes_the_flow():
    transforms = TransformNetworks(Zhao(2).config)
    smooth = [ndimage.gaussian_filter(np.random.default_rng(n).standard_normal(GRID), 4) for n in range(3)]
    velocity = torch.from_numpy(np.stack(smooth)[None]).float() * 60
    image = torch.from_numpy(textured(3))[None, None]
    there = transforms.linear(image, transforms.flow(velocity))
    back = transforms.linear(there, transforms.flow(-velocity))
    inner = (..., slice(5, -5), slice(5, -5), slice(5, -5))
    assert (there - image)[inner].abs().mean() > 3 * (back - image)[inner].abs().mean()


def test_synthesised_labels_are_warped_with_the_volume():
    method = Zhao(2)
    transforms = TransformNetworks(method.config)
    atlas = item(textured(), "atlas")
    shift = torch.zeros(1, 3, *GRID)
    shift[:, 0] = 3.0
    transforms.velocity = lambda _, target: shift.expand(len(target), -1, -1, -1, -1)
    transforms.change = lambda _, aligned: torch.zeros_like(aligned)
    looks = torch.rand(2, 1, *GRID)
    x, y = method.synthesize(transforms, atlas["volume"][None], atlas["labels"], looks, looks)
    assert x.shape == (2, 1, *GRID) and y.shape == (2, *GRID)
    torch.testing.assert_close(x[0, 0, :-3], atlas["volume"][0, 3:], rtol=1e-4, atol=1e-4)
    assert torch.equal(y[0, :-3], atlas["labels"][3:])


def test_gradient_penalty_by_hand():
    field = torch.zeros(1, 1, 2, 3, 2)
    field[:, :, 1] = 2.0
    assert gradient_penalty(field).item() == pytest.approx(4 / 3)
    keep = [torch.zeros(1, 1, 1, 3, 2, dtype=torch.bool), *(torch.ones(1, 1, 1, 1, 1, dtype=torch.bool),) * 2]
    assert gradient_penalty(field, keep).item() == 0


def test_it_wants_one_labelled_volume():
    volumes = LimitedLabels(many_halves(3), lambda i: halves(0.1)["labels"], "slice")
    with pytest.raises(InputError, match="exactly one volume must be labelled, got 3"):
        Zhao(2).fit(volumes)

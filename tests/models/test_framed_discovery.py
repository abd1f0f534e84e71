"""Robust scaling and frames in the discovery network."""

import numpy as np
import pytest
import torch

from diffdiscover3d.data.foreground import Frame, find_foreground, robust_scale
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel

SMALL = {"channels": (4, 8), "strides": (2,), "norm": "instance", "dropout": 0.0}
FRAME = (16, 24, 20)


def head(shape=(22, 30, 26), seed: int = 0) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.linspace(-1.2, 1.2, n) for n in shape], indexing="ij")
    inside = sum(a**2 for a in axes) < 1
    return torch.where(inside, torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 1, torch.tensor(0.0))


def framed(**config) -> StructureDiscoveryModel:
    torch.manual_seed(0)
    return StructureDiscoveryModel(2, scaling="robust", frame=FRAME, **SMALL, **config).eval()


def test_old_configurations_keep_min_max():
    model = StructureDiscoveryModel(2, **SMALL)
    assert model.config.scaling == "min_max" and model.config.frame is None
    volume = head()[None, None] * 7 - 3
    torch.testing.assert_close(model.scale(volume), (volume - volume.min()) / (volume.max() - volume.min()))


def test_segment_works_in_the_frame_and_on_the_volumes_own_grid():
    model, volume = framed(), head()
    found = model.segment(volume)
    foreground = find_foreground(volume[None, None])
    frame = Frame.around(foreground, FRAME)
    inner = frame.crop(robust_scale(volume[None, None], foreground))
    with torch.no_grad():
        expected = frame.paste(model.scaled_logits(inner).softmax(dim=1))
    torch.testing.assert_close(found.probabilities, expected)
    assert found.labels.shape == (1, *volume.shape)


def test_resolution_and_unit_of_a_scan_hardly_matter():
    """The network's input is the same brain in the same frame."""
    axes = torch.meshgrid(*[torch.linspace(-1.2, 1.2, n) for n in (66, 90, 78)], indexing="ij")
    smooth = 2 + torch.sin(3 * axes[0]) * torch.cos(2 * axes[1]) + axes[2]
    fine = torch.where(sum(a**2 for a in axes) < 1, smooth, torch.tensor(0.0))[None, None]
    inputs = []
    for volume in (fine * 100 + 5, fine[..., 1::3, 1::3, 1::3]):
        foreground = find_foreground(volume)
        inputs.append(Frame.around(foreground, FRAME).crop(robust_scale(volume, foreground)))
    assert np.corrcoef(inputs[0].flatten(), inputs[1].flatten())[0, 1] > 0.97


def test_a_batch_is_segmented_volume_by_volume():
    model, volumes = framed(), torch.stack([head(seed=0), head(seed=1)])
    both = model.segment(volumes)
    torch.testing.assert_close(both.probabilities[1], model.segment(volumes[1]).probabilities[0])


def test_a_nested_network_takes_scaling_and_frame_from_its_parent(tmp_path):
    model = StructureDiscoveryModel.from_parent(framed(), (1, 2), **SMALL).eval()
    assert model.config.scaling == "robust" and tuple(model.config.frame) == FRAME
    model.save_pretrained(tmp_path)
    again = StructureDiscoveryModel.from_pretrained(tmp_path).eval()
    volume = head()
    torch.testing.assert_close(again.segment(volume).probabilities, model.segment(volume).probabilities)
    labels = model.segment(volume).labels
    assert set(labels.unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling": "other"}, "`scaling` must be one of"),
        ({"frame": FRAME}, "needs robust scaling"),
        ({"scaling": "robust", "frame": (4, 24, 20)}, "three integers >= 8"),
    ],
)
def test_wrong_options_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        StructureDiscoveryModel(2, **SMALL, **config)


def test_a_child_of_another_frame_is_refused():
    with pytest.raises(ValueError, match="must be the parent's"):
        StructureDiscoveryModel.from_parent(framed(), (1, 2), **SMALL, frame=(16, 16, 16))

"""MedicalNet's weights: the published layout loads, nothing else does, and nothing in a file is executed."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffdiscover3d.baselines.med3d import (
    Med3DDiscovery,
    Med3DFeatures,
    Med3DKMeans,
    load_med3d,
    upsample_plane,
)
from diffdiscover3d.errors import ModelError
from diffdiscover3d.evaluation.metrics import dice_matrix, matched_dice
from tests.baselines.toys import halves, many_halves


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Made-up weights under the published names."""
    torch.manual_seed(0)
    state = Med3DFeatures().network.state_dict()
    assert state["layer1.2.conv2.weight"].shape == (64, 64, 3, 3, 3) and len(state) > 300
    assert state["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1, 1)
    assert not [name for name in state if name.startswith("fc")]
    return state


@pytest.mark.parametrize("kind", ["published", "plain", "without counters", "safetensors"])
def test_weights_of_the_published_layout_load(tmp_path, weights, kind):
    file = tmp_path / "resnet_50.pth"
    if kind == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(weights, file)
    elif kind == "published":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, file)
    else:
        kept = {k: v for k, v in weights.items() if kind == "plain" or not k.endswith("num_batches_tracked")}
        torch.save(kept, file)
    features = load_med3d(file)
    assert torch.equal(features.network.layer1[2].conv2.weight, weights["layer1.2.conv2.weight"])
    assert not any(p.requires_grad for p in features.parameters()) and not features.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer1.2.conv2.weight"), "lacks layer1.2.conv2.weight"),
        (lambda s: s.update({"fc.weight": torch.ones(1)}), "has unknown fc.weight"),
        (lambda s: s.update({"conv1.weight": torch.ones(64, 3, 7, 7, 7)}), "has other shapes of conv1.weight"),
    ],
)
def test_other_weights_are_refused(tmp_path, weights, change, message):
    state = dict(weights)
    change(state)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=message):
        load_med3d(tmp_path / "a.pth")


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_nothing_in_a_file_is_executed(tmp_path):
    marker = tmp_path / "executed"
    for name, save in (("torch.pth", torch.save), ("pickle.pth", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save({"state_dict": Attack(marker)}, tmp_path / name)
        with pytest.raises(ModelError, match="is not a file of weights"):
            load_med3d(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04K\x01."])
def test_damaged_files(tmp_path, content):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError):
            load_med3d(tmp_path / name)


def test_neither_file_nor_hub_id(tmp_path):
    with pytest.raises(ModelError, match="is neither a file nor a Hub id"):
        load_med3d(tmp_path / "no" / "such file.pth")


def test_features_are_those_of_the_hooked_layer():
    torch.manual_seed(0)
    features = Med3DFeatures(seed=4)
    volume = torch.rand(2, 1, 24, 20, 28)
    found = {}
    handle = features.network.layer1[2].conv2.register_forward_hook(lambda m, i, o: found.setdefault("hooked", o))
    features.network.eval()(features.standardize(volume))
    handle.remove()
    ours = features(volume)
    torch.testing.assert_close(ours, found["hooked"])
    assert ours.shape == (2, 64, 6, 5, 7)


def test_voxels_are_standardised_and_zeros_replaced_by_seeded_noise():
    volume = torch.rand(1, 1, 12, 10, 8) + 0.5
    volume[..., :5] = 0
    found = Med3DFeatures(seed=1).standardize(volume)
    inside = found[..., 5:]
    assert inside.mean().item() == pytest.approx(0, abs=1e-5) and inside.std(correction=0).item() == pytest.approx(1)
    assert torch.equal(found, Med3DFeatures(seed=1).standardize(volume))
    assert found[..., :5].std().item() == pytest.approx(1, abs=0.15)
    assert not torch.equal(found[..., :5], Med3DFeatures(seed=2).standardize(volume)[..., :5])


def test_planes_of_upsampled_features_are_trilinear():
    coarse, grid = torch.rand(1, 3, 4, 3, 5), (13, 7, 11)
    whole = torch.nn.functional.interpolate(coarse, grid, mode="trilinear", align_corners=True)
    for plane in (0, 5, 12):
        torch.testing.assert_close(upsample_plane(coarse, plane, grid), whole[:, :, plane], rtol=1e-4, atol=1e-5)


def test_kmeans_on_features_is_a_partition_that_repeats():
    torch.manual_seed(0)
    features, volume = Med3DFeatures(), halves(0.02)
    found = Med3DKMeans(2, features).predict(volume["volume"])
    assert found.dtype == np.uint8 and np.array_equal(found, Med3DKMeans(2, features).predict(volume["volume"]))
    assert matched_dice(dice_matrix(found, volume["labels"].numpy(), 2, 2)) > 0.6


def test_our_losses_with_other_features(tmp_path):
    torch.manual_seed(0)
    features, volumes = Med3DFeatures(), many_halves(3, noise=0.05)
    settings = {"steps": 40, "learning_rate": 3e-3, "dropout": 0.0, "lambda_feature": 0.1}
    method = Med3DDiscovery(2, features, **settings)
    before = {k: v.clone() for k, v in features.state_dict().items()}
    method.fit(volumes, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in features.state_dict().items())  # frozen
    found = method.predict(volumes[0]["volume"])
    assert matched_dice(dice_matrix(found, volumes[0]["labels"].numpy(), 2, 2)) > 0.8
    with torch.no_grad():
        features.network.conv1.weight.mul_(2)
    with pytest.raises(ModelError, match="made with other settings"):
        Med3DDiscovery(2, features, **settings).fit(volumes, tmp_path)

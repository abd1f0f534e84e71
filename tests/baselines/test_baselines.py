"""Baselines on volumes with known segmentations."""

import numpy as np
import pytest
import torch

from diffdiscover3d.baselines.bm4d_kmeans import BM4DKMeans, noise_std
from diffdiscover3d.baselines.denoised_kmeans import DenoisedKMeans
from diffdiscover3d.baselines.features_kmeans import FeaturesKMeans, join_equally
from diffdiscover3d.baselines.kmeans import IntensityKMeans
from diffdiscover3d.evaluation.metrics import dice_matrix, matched_dice
from diffdiscover3d.hub.registry import load_teacher


def halves(noise: float) -> tuple[torch.Tensor, np.ndarray]:
    labels = np.zeros((20, 24, 16), dtype=np.uint8)
    labels[:, 12:] = 1
    values = labels + noise * np.random.default_rng(0).standard_normal(labels.shape)
    return torch.from_numpy(values.astype(np.float32))[None], labels


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_noise_std_of_white_noise_beside_an_edge(std):
    volume, _ = halves(std)
    assert noise_std(volume[0].numpy().astype(np.float64)) == pytest.approx(std, rel=0.05)


def test_bm4d_denoises_before_it_clusters():
    pytest.importorskip("bm4d")
    volume, labels = halves(0.5)
    found = {m.name: m.predict(volume) for m in (BM4DKMeans(2), IntensityKMeans(2))}
    dice = {name: matched_dice(dice_matrix(parts, labels, 2, 2)) for name, parts in found.items()}
    assert dice["BM4D + k-means"] > 0.97 > 0.9 > dice["k-means"]


def test_bm4d_is_asked_once_for_each_volume(monkeypatch):
    """Whatever the number of parts; and of two volumes neither gets the other's."""
    pytest.importorskip("bm4d")
    asked = []

    def denoise(values, _):
        asked.append(values)
        return values + len(asked)

    volumes = torch.rand(2, 1, 6, 7, 5)
    for parts in (2, 4):
        baseline = BM4DKMeans(parts)
        monkeypatch.setattr(baseline, "_bm4d", denoise)
        for number, volume in enumerate(volumes, start=1):
            np.testing.assert_allclose(baseline.denoise(volume), volume[0] + number, rtol=1e-5)
    assert len(asked) == 2


def test_bm4d_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm4d", None)
    with pytest.raises(ValueError, match=r"diffdiscover3d\[bm4d\]"):
        BM4DKMeans(2)


def test_features_kmeans_is_a_partition_that_repeats():
    volume, labels = halves(0.05)
    method = FeaturesKMeans(2, load_teacher("synthetic-regular"), stages=(3,), num_noise=1, seed=1)
    first, second = method.predict(volume), method.predict(volume)
    assert first.shape == labels.shape and first.dtype == np.uint8 and np.array_equal(first, second)
    assert method.name == "features k-means, stage 3"
    assert matched_dice(dice_matrix(first, labels, 2, 2)) > 0.8


def test_stages_are_joined_with_equal_weight():
    rng = np.random.default_rng(0)
    joined = join_equally([rng.normal(size=(300, 8)) * 50, rng.normal(size=(300, 2)) * 0.01])
    assert joined.shape == (300, 10)
    assert joined[:, :8].var(axis=0).sum() == pytest.approx(1) == joined[:, 8:].var(axis=0).sum()
    teacher = load_teacher("synthetic-regular")
    volume, labels = halves(0.05)
    method = FeaturesKMeans(2, teacher, stages=(1, 2, 3), num_noise=1)
    assert method.name == "features k-means, stages 1, 2, 3"
    assert matched_dice(dice_matrix(method.predict(volume), labels, 2, 2)) > 0.8


def test_denoised_kmeans_is_kmeans_on_the_clean_prediction():
    teacher, (volume, labels) = load_teacher("synthetic-regular"), halves(0.2)
    found = DenoisedKMeans(2, teacher, timestep=40, num_noise=2, seed=3).predict(volume)
    draws = torch.Generator().manual_seed(3)
    clean = teacher(volume[None], 40, (1,), draws, 2, denoised=True).denoised[0]
    assert found.dtype == np.uint8 and np.array_equal(found, IntensityKMeans(2, 3).predict(clean))
    plain = IntensityKMeans(2).predict(volume)
    assert matched_dice(dice_matrix(found, labels, 2, 2)) > matched_dice(dice_matrix(plain, labels, 2, 2))

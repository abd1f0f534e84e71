"""The clustering layer of the autoencoder, by formula."""

import numpy as np
import pytest
import torch

from diffdiscover3d.baselines.nalepa import Nalepa, soft_assignment, target_distribution
from diffdiscover3d.evaluation.metrics import dice_matrix, matched_dice
from tests.baselines.toys import halves, many_halves


def test_soft_assignment_is_students_t():
    latents, centres = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    # squared distances 0, 9 and 25, 10: 1/(1+d²) = 1, 1/10 and 1/26, 1/11
    expected = torch.tensor([[1, 0.1], [1 / 26, 1 / 11]])
    torch.testing.assert_close(
        soft_assignment(latents, centres), expected / expected.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-6
    )


def test_target_distribution_by_hand():
    q = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    # frequencies 1.2 and 0.8; q²/f: 0.5333, 0.05 and 0.1333, 0.45
    torch.testing.assert_close(
        target_distribution(q),
        torch.tensor([[0.64 / 1.2, 0.04 / 0.8], [0.16 / 1.2, 0.36 / 0.8]])
        / torch.tensor([[0.64 / 1.2 + 0.05], [0.16 / 1.2 + 0.45]]),
    )


def test_it_separates_two_intensities():
    volumes = many_halves(4, noise=0.05)
    method = Nalepa(2, pool_patches=2_000, pretraining_steps=60, clustering_epochs=2, dropout=0.0, channels=8)
    method.fit(volumes)
    found = method.predict(halves(0.05, number=7)["volume"])
    true = halves(0.05, number=7)["labels"].numpy()
    assert matched_dice(dice_matrix(found, true, 2, 2)) > 0.9


def test_pretraining_is_shared_and_clustering_is_not(tmp_path):
    volumes = many_halves(2)
    settings = {"pool_patches": 300, "pretraining_steps": 3, "clustering_epochs": 1, "channels": 4}
    first, second = Nalepa(2, **settings), Nalepa(3, **settings)
    first.fit(volumes, tmp_path)
    before = sorted(p.name for p in (tmp_path / "pretraining").iterdir())
    second.fit(volumes, tmp_path)
    assert sorted(p.name for p in (tmp_path / "pretraining").iterdir()) == before
    assert {p.name for p in tmp_path.iterdir()} == {"pretraining", "clustering-2", "clustering-3"}
    assert np.unique(second.predict(volumes[0]["volume"])).max() <= 2


def test_presets():
    paper = Nalepa(2, preset="paper").config
    assert (paper.features, paper.dropout, paper.lambda_clustering, paper.clustering_epochs) == (25, 0.5, 0.1, 25)
    with pytest.raises(ValueError, match="`preset` must be one of"):
        Nalepa(2, preset="huge")

"""What is written down of the exploration is what was tried."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.explorations import assignments, signals, trainings
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeatureOutput


def test_whitened_channels_are_uncorrelated_and_standardised_ones_have_variance_one():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(5000, 3)) @ np.array([[2.0, 0, 0], [1.5, 1, 0], [0, 0, 30]]) + 7
    assert np.array_equal(signals.scale([signal[:, :1], signal[:, 1:]], "plain"), signal)
    standardised = signals.scale([signal], "standardised")
    assert np.allclose(standardised.mean(axis=0), 0) and np.allclose(standardised.std(axis=0), 1, atol=1e-5)
    covariance = np.cov(signals.scale([signal[:, :2]], "whitened"), rowvar=False)
    assert np.allclose(covariance, np.eye(2), atol=2e-2)


def test_parts_are_divided_each_for_itself_and_numbered_through():
    parents = np.repeat([0, 1, 2], (50, 60, 70))
    # both halves of part 1 lie inside the range of part 2: one k-means over everything could not tell them apart
    signal = np.concatenate([np.full(50, 9.0), np.repeat([1.0, 1.1], 30), np.repeat([0.0, 5.0], 35)])[:, None]
    found = signals.divide([signal], parents, (1, 2, 2), "plain", seed=0)
    assert set(found[:50]) == {0} and set(found[50:110]) == {1, 2} and set(found[110:]) == {3, 4}
    for first, last in ((50, 80), (80, 110), (110, 145), (145, 180)):
        assert len(set(found[first:last])) == 1


def test_several_stages_weigh_the_same_inside_the_part_that_is_divided(monkeypatch):
    maps = tuple(torch.randn(1, channels, 4, 5, 6) * size for channels, size in ((8, 3.0), (2, 0.1), (4, 1.0)))
    found = DiffusionFeatureOutput(maps, (1, 2, 3), (4, 5, 6), torch.rand(1, 1, 4, 5, 6))
    both = signals.voxelwise(found, (1, 2))
    assert [m.shape for m in both] == [(120, 8), (120, 2)]
    assert np.array_equal(both[1], maps[1][0].flatten(1).T.numpy())
    assert np.array_equal(signals.voxelwise(found, ())[0][:, 0], found.denoised.flatten().numpy())
    clustered = []

    class Clusters:
        def __init__(self, *arguments, **options):
            pass

        def fit_predict(self, signal):
            clustered.append(signal)
            return np.zeros(len(signal), np.uint8)

    monkeypatch.setattr(signals, "MiniBatchKMeans", Clusters)
    signals.divide(both, np.repeat([0, 1], (70, 50)), (1, 2), "equal", seed=0)
    (signal,) = clustered
    assert signal.shape == (50, 10)
    assert signal[:, :8].var(axis=0).sum() == pytest.approx(1, rel=1e-4)
    assert signal[:, 8:].var(axis=0).sum() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_trial_changes_one_thing(level):
    own, clean, *others, weights = signals.trials(level)
    assert own.stages == (level,) and clean.stages == () and weights.scaling == "plain"
    assert dataclasses.replace(own, stages=(1, 2, 3), changes="stages") in others  # what the weights compare with
    for trial in others:
        base = own if trial.stages else clean
        differing = [k for k in ("stages", "timestep", "draws", "scaling") if getattr(trial, k) != getattr(base, k)]
        assert differing == [trial.changes]


def test_inclusions_outside_of_the_cell_are_counted_whichever_part_the_cell_is():
    coarse = np.zeros((4, 5, 6), np.int64)
    coarse[1:3] = 1
    fine = coarse.copy()
    fine[1, :2] = 2  # 12 voxels
    fine[2, :1] = 3  # 6 voxels
    values = np.where(fine == 3, 1.0, np.where(coarse > 0, 4.0, 0.0))  # the lost inclusions are near the background
    volume = torch.from_numpy(values.astype(np.float32))[None]
    volumes = [{"volume": volume, "labels": torch.from_numpy(np.stack([coarse, fine, fine]))}]
    found = coarse.copy()
    found[2, :1] = 0
    for labels in (found, 1 - found):
        cell = SimpleNamespace(segment=lambda v, x=labels: SimpleNamespace(labels=torch.from_numpy(x)[None]))
        row = trainings.lost_inclusions(cell, volumes)
        assert row["outside"] == pytest.approx(6 / 18, abs=1e-4)
        # by hand: background of 60 zeros and 6 ones, a cell of 54 fours; or 60 zeros, and 54 fours with 6 ones
        total = np.var(values) * 120
        assert row["variance_left"] == pytest.approx((6 - 6 * 6 / 66) / total, abs=1e-4)
        assert row["variance_left_with_them"] == pytest.approx((54 * 16 + 6 - (54 * 4 + 6) ** 2 / 60) / total, abs=1e-4)


def test_options_of_a_training_are_those_its_preset_does_not_have(tmp_path):
    config = trainings.make_config(
        trainings.DiscoveryConfig,
        preset="small", dataset="synthetic-regular", teacher="/home/me/models/cells/diffusion", num_parts=2,
        stages=(1, 3), log_every=7, init_from="/here/before",
    )  # fmt: skip
    given = {**dataclasses.asdict(config), "preset": "small"}
    (tmp_path / "train_config.json").write_text(json.dumps(given))
    found = trainings.changed_options(tmp_path, {Path("/here/before"): "features first"})
    assert found == {
        "preset": "small",
        "dataset": "synthetic-regular",
        "teacher": "models/cells/diffusion",
        "stages": [1, 3],
        "init_from": "features first",
    }


def test_divisions_are_ranked_by_each_rule():
    found = [
        {"Dice": 0.9, "contrast": 1.0, "separation": 1.0},
        {"Dice": 0.5, "contrast": 3.0, "separation": 0.0},  # one object in two halves
        {"Dice": 0.8, "contrast": 2.0, "separation": 0.9},
        {"Dice": 0.6, "contrast": 0.5, "separation": 0.2},
    ]
    (row,) = assignments.best_halves({(2, 1): found})
    assert row["all"] == pytest.approx(0.7) and row["better half by contrast"] == pytest.approx(0.65)
    assert row["better half by separation"] == row["better half by Dice"] == pytest.approx(0.85)


def test_a_division_is_scored_inside_the_part_it_divides():
    grid = (12, 10, 8)
    before, true = np.zeros(grid, dtype=np.int64), np.zeros(grid, dtype=np.int64)
    before[1:11, 1:9, 1:7] = 1
    true[before == 1] = 1
    true[2:5, 2:5, 2:5], true[7:9, 6:8, 3:5] = 2, 3
    found = np.choose(true, [0, 1, 3, 2])  # the inclusions in the other order: matched
    raw = np.asarray([0.0, 1.0, 3.0, -1.0])[true] + np.random.default_rng(0).normal(0, 0.2, grid)
    ((part, values),) = assignments.rank(raw, found, np.stack([before, true]), 2)
    assert part == 1 and values["Dice"] == 1.0
    assert values["contrast"] == pytest.approx(10, rel=0.1) and values["separation"] == pytest.approx(10, rel=0.1)
    found[2:5, 2:5, 2:5] = 1
    ((_, values),) = assignments.rank(raw, found, np.stack([before, true]), 2)
    assert values["separation"] == 0.0 and values["Dice"] == pytest.approx((2 * 445 / (445 + 472) + 1) / 3)

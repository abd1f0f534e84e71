"""k-means on features of brains: on a scan whose clusters are known, and the figures of the pages."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from benchmarks import RESULTS
from benchmarks.explorations.brain_features import INTENSITIES, STAGES, measure, summarise, to_scan
from diffdiscover3d.hub.registry import embedded_models
from diffdiscover3d.utils.files import read_json
from diffdiscover3d.utils.provenance import weights_sha256

SHAPE = (28, 36, 24)


def blocks() -> tuple[np.ndarray, np.ndarray]:
    """A brain of two tissues around a bright lesion, and the mask of the lesion."""
    volume, lesion = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, bool)
    volume[4:24, 4:32, 4:20], volume[4:14, 4:32, 4:20] = 100, 140
    lesion[8:20, 12:24, 8:16] = True
    noise = np.random.default_rng(0).uniform(-1, 1, SHAPE) * (volume > 0)
    return (np.where(lesion, 220, volume) + noise).astype(np.float32), lesion


def teacher_of(*maps):
    """A teacher whose features are functions of the volume, one for each stage."""

    def run(volume, timestep, stages, generator, draws, upsample):
        assert (timestep, draws, upsample) == (25, 4, True)
        return SimpleNamespace(features=tuple(maps[stage - 1](volume) for stage in stages))

    return run


def test_the_brightest_cluster_is_the_lesion_where_features_are_intensities(tmp_path):
    volume, lesion = blocks()
    for name, data in (("flair", volume), ("lesion", lesion.astype(np.uint8))):
        nib.save(nib.Nifti1Image(data, np.diag([1.5, 1.5, 1.5, 1])), tmp_path / f"a_{name}.nii.gz")
    left = torch.arange(SHAPE[0]).reshape(1, 1, -1, 1, 1).expand(1, 1, *SHAPE).float()
    teachers = {"intensity": teacher_of(lambda v: v, lambda v: -v, lambda v: left)}
    rows = measure(tmp_path / "a_flair.nii.gz", teachers, seed=0)
    assert len(rows) == 3 + 3 * len(STAGES)
    found = {(r["teacher"], *r["stages"], r["divided"], r["clusters"]): r for r in rows}
    for key in ((INTENSITIES,), ("intensity", 1), ("intensity", 2)):
        assert found[(*key, "brain", 3)]["dice"] == 1 and found[(*key, "brain", 3)]["hd95_mm"] == 0
    # slabs of 6 or 7 of the brain's 20 slices: the middle one holds 6 of the lesion's 12, Dice 2*6*96 / (6*448 + 12*96)
    slabs = found["intensity", 3, "brain", 3]
    assert slabs["dice_chosen_with_mask"] == pytest.approx(0.3, abs=0.03)
    assert slabs["dice"] <= slabs["dice_chosen_with_mask"]


def test_a_mask_returns_to_the_grid_of_the_scan():
    mask = np.zeros((10, 12, 8), bool)
    mask[2:6, 3:9, 2:6] = True
    expected = np.kron(mask, np.ones((2, 2, 2))) > 0
    found = to_scan(mask, (20, 24, 16))
    assert found.shape == expected.shape and (found != expected).sum() < 0.15 * expected.sum()
    assert found[5:11, 7:17, 5:11].all() and not found[~expected].any()


def test_means_are_over_scans():
    def row(dice):
        base = {"teacher": "t", "stages": [1], "divided": "brain", "clusters": 3, "hd95_mm": 10 * dice}
        return base | {"dice": dice, "dice_chosen_with_mask": 0.5}

    (mean,) = summarise({"a": [row(0.2)], "b": [row(0.4)]})
    assert mean["dice"] == pytest.approx(0.3) and mean["dice_std"] == pytest.approx(0.1)
    assert mean["hd95_mm"] == pytest.approx(3) and (mean["teacher"], mean["stages"]) == ("t", [1])


def test_the_card_holds_the_figures_of_the_measurement():
    result = read_json(RESULTS / "brain-features.json")
    assert all(not name.startswith("brats") for name in result["cases"]) and len(result["cases"]) == 6
    for name, weights in result["weights_sha256"].items():
        assert weights == weights_sha256(embedded_models()[name].diffusion)
    card = (RESULTS.parents[1] / "hub_cards" / "brain-flair.md").read_text(encoding="utf-8")
    rows = {(r["teacher"], *r["stages"], r["clusters"]): r for r in result["means"] if r["divided"] == "brain"}

    def cells(*key) -> str:
        return " | ".join(f"{rows[(*key, count)]['dice']:.3f}".lstrip("0") for count in (3, 8))

    for stages in STAGES:
        label = "all" if len(stages) > 1 else stages[0]
        assert f"| {label} | {cells('brain-flair', *stages)} | {cells('synthetic-regular', *stages)} |" in card
    assert f"(.{round(1000 * rows[INTENSITIES, 3]['dice'])} and .{round(1000 * rows[INTENSITIES, 8]['dice'])})" in card

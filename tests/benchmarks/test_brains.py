"""The scores of brains: baselines and bounds on phantoms, and means over cases."""

import numpy as np
import pytest

from benchmarks.paper.brains import BASELINES, BOUND, best_threshold, mean_scores, score
from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.evaluation.metrics import binary_dice


@pytest.fixture(scope="module")
def phantom():
    return brain_phantom("test", 0)


def test_the_best_threshold_is_no_worse_than_any_of_its_thresholds(phantom):
    lesion = phantom.labels[1] == 2
    dice, found = best_threshold(phantom.volume, lesion, cleaned=False)
    assert dice == binary_dice(found, lesion)
    for quantile in (0.5, 0.9, 0.98, 0.9999):
        assert dice >= binary_dice(phantom.volume > np.quantile(phantom.volume[phantom.volume > 0], quantile), lesion)


@pytest.mark.parametrize("name", ["Gaussian mixture of 5, brightest", "first assignment"])
def test_bright_lesions_of_a_phantom_are_found_without_a_mask(phantom, name):
    assert binary_dice(BASELINES[name](phantom.volume), phantom.labels[1] == 2) > 0.6


def test_a_score_is_in_millimetres_and_millilitres():
    lesion = np.zeros((20, 22, 24), bool)
    lesion[5:11, 5:11, 5:11] = True
    row = score(np.roll(lesion, 2, axis=1), lesion, (1.0, 1.5, 1.0), glioma=True)
    assert row["dice"] == pytest.approx(2 / 3) and row["hd95_mm"] == pytest.approx(3)
    assert row["found_ml"] == pytest.approx(6**3 * 1.5 / 1000) and row["postprocessed"]["dice"] == pytest.approx(
        2 / 3, abs=0.1
    )


def test_means_are_over_gliomas_and_other_scans_apart():
    def row(dice):
        return {"dice": dice, "hd95_mm": 10 * dice, "postprocessed": {"dice": 1.0, "hd95_mm": 2.0}}

    cases = {"brats-1": {BOUND: row(0.5)}, "brats-2": {BOUND: row(0.7)}, "ms-1": {BOUND: row(0.1)}}
    glioma, ms = mean_scores(cases)
    assert glioma["dice"] == pytest.approx(0.6) and glioma["dice_postprocessed"] == 1 and glioma["cases"] == 2
    assert ms["lesion"] == "MS" and ms["dice"] == pytest.approx(0.1) and "dice_postprocessed" not in ms

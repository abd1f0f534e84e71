"""How far scans are from those a model was trained on."""

import json
from pathlib import Path

import numpy as np
import pytest

from diffdiscover3d.data.datasets.synthetic import synthesize
from diffdiscover3d.data.domain import FAR, NAMES, describe_block, distance, domain_note, signature, summarise
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.hub.resolve import resolve_model
from tests.helpers.opened_scans import open_slabs


def test_numbers_of_known_blocks():
    noise = np.random.default_rng(0).normal(0.5, 0.1, (40, 41, 42))
    found = dict(zip(NAMES, describe_block(noise), strict=True))
    assert found["50 % quantile"] == pytest.approx(0.5, abs=0.01)
    assert found["spread of intensities"] == pytest.approx(0.1, rel=0.02)
    assert found["correlation of voxels 1 apart"] == pytest.approx(0, abs=0.01)
    assert found["evenness of differences 2 apart"] == pytest.approx(np.sqrt(2 / np.pi), abs=0.005)  # of a Gaussian
    halves = np.zeros((20, 20, 20))
    halves[10:] = 1  # one step along one of three axes
    found = dict(zip(NAMES, describe_block(halves), strict=True))
    assert found["evenness of differences 1 apart"] == pytest.approx(np.sqrt(1 / 19) / 3, abs=1e-4)
    assert np.isfinite(describe_block(np.zeros((5, 6, 7)))).all()


def test_the_distance_is_that_of_mahalanobis():
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(len(NAMES), len(NAMES)))
    table = rng.normal(size=(4000, len(NAMES))) @ mixing
    away = [distance(row, summarise(table))[0] ** 2 for row in table[:500]]
    assert np.mean(away) == pytest.approx(1, abs=0.1)  # chi-squared over its degrees of freedom


def test_few_scans_make_no_narrow_domain():
    numbers = [describe_block(synthesize("regular", "train", i).volume) for i in range(2)]
    assert all(distance(n, summarise(numbers))[0] < 1 for n in numbers)
    assert distance(numbers[0], summarise(numbers[:1]))[0] == 0


@pytest.mark.parametrize("name", ["synthetic-regular", "synthetic-irregular"])
def test_embedded_models_tell_cells_from_scans(name):
    domain = resolve_model(name).domain
    variant = name.removeprefix("synthetic-")
    for index in range(6):
        volume = synthesize(variant, "test", index).volume
        block = (volume - volume.min()) / (volume.max() - volume.min())
        assert distance(describe_block(block), domain)[0] < FAR
    measured = json.loads((Path(__file__).parents[2] / "benchmarks/results/domain.json").read_text())["models"][name]
    assert max(measured["synthetic_test_largest"].values()) < FAR < min(measured["scans"].values())


def test_the_note_of_a_scan_in_memory_or_on_disk(tmp_path, make_nifti):
    domain = resolve_model("synthetic-regular").domain
    blob = np.zeros((40, 44, 50), np.float32)
    blob[10:30, 12:30, 10:40] = 1000
    path = make_nifti(tmp_path / "scan.nii.gz", blob + np.random.default_rng(0).normal(0, 1, blob.shape))
    scan = read_volume(path)
    note = domain_note(scan, domain, "synthetic-regular")
    assert note.startswith("unlike the scans that synthetic-regular was trained on") and "discover FOLDER" in note
    assert "\n" not in note and domain_note(scan, None, "x") is None
    with open_slabs(path, tmp_path) as slabs:
        assert signature(slabs) == pytest.approx(signature(scan), abs=1e-4)
    assert domain_note(scan, {"names": ["other"]}, "x") is None

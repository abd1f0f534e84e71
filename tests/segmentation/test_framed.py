"""`segment` with networks that have a frame: grid, nesting, notes, and no slabs."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.data.formats.nifti.source import open_nifti
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.in_memory import WHOLE_HEAD
from diffdiscover3d.segmentation.preflight import plan_memory

SMALL = {"channels": (4, 8), "strides": (2,), "norm": "instance", "dropout": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    coarse = StructureDiscoveryModel(2, scaling="robust", frame=(32, 40, 36), **SMALL)
    folder = tmp_path_factory.mktemp("framed")
    StructureDiscoveryModel.from_parent(coarse, (1, 2), **SMALL).save_pretrained(folder)
    return folder


def save(path, array, spacing=2.0):
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([spacing, spacing, spacing, 1])), path)
    return path


def brain() -> np.ndarray:
    return np.pad(brain_phantom("test", 0).volume[::2, ::2, ::2], ((3, 8), (0, 0), (5, 1)))


def test_parts_are_on_the_scans_grid_and_nothing_lies_outside_of_the_frame(model, tmp_path):
    scan = save(tmp_path / "scan.nii.gz", brain())
    (done,) = segment(scan, tmp_path / "out", model=str(model), level="all")
    for level in (1, 2):
        labels = np.asarray(nib.load(done.levels[level].labels).dataobj)
        assert labels.shape == brain().shape and labels.max() < level + 1
        assert not labels[-5:].any() and not labels[..., :2].any()  # beyond the frame all is part 0
    assert WHOLE_HEAD not in json.loads(done.levels[1].sidecar.read_text())["notes"]


def test_fast_changes_nothing_since_the_frame_is_the_working_grid(model, tmp_path):
    scan = save(tmp_path / "scan.nii.gz", brain())
    (plain,) = segment(scan, tmp_path / "plain", model=str(model))
    (fast,) = segment(scan, tmp_path / "fast", model=str(model), fast=True)
    found = [np.asarray(nib.load(done.labels).dataobj) for done in (plain, fast)]
    assert np.array_equal(*found)


def test_a_whole_head_is_noted_once(model, tmp_path):
    volume = brain()
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in volume.shape], indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    head = np.where(radius < 0.6, 0.5, np.where(radius < 0.85, 0.1, np.where(radius < 0.93, 0.8, 0.0)))
    (done,) = segment(save(tmp_path / "head.nii.gz", head), tmp_path / "out", model=str(model), level="all")
    notes = json.loads(done.levels[1].sidecar.read_text())["notes"]
    assert notes.count(WHOLE_HEAD) == 1


def test_large_scans_are_not_divided_by_slabs(make_nifti, tmp_path):
    """Percentiles of the foreground need all of a scan."""
    path = make_nifti(tmp_path / "large.nii", np.arange(20**3).reshape(20, 20, 20).astype(np.int16))
    network = {"window_size": 16, "channels": [4], "num_parts": 3}
    with open_nifti(path) as file:
        assert plan_memory(file, network, True).by_slabs
        assert not plan_memory(file, {**network, "scaling": "robust"}, True).by_slabs
        assert not plan_memory(file, {**network, "scaling": "robust", "frame": [32, 32, 32]}, True).by_slabs

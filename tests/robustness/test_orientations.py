"""All 48 axis orders and flips of one oblique volume: the same parts at the same world coordinates."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff

from diffdiscover3d.data.datasets.synthetic import synthesize
from diffdiscover3d.data.formats.nifti.reading import read_nifti, write_like
from diffdiscover3d.segmentation.driver import segment

pytestmark = pytest.mark.slow


def oblique() -> np.ndarray:
    a, b = np.deg2rad([12, -7])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = about_z @ about_x @ np.diag([1.5, 2.0, 3.0]), (-20, 11, 5)
    return affine


def test_all_orientations(tmp_path, count):
    volume = synthesize("regular", "test", 0).volume[:46, :50, :41].astype(np.float32)
    reference, agreements, exact = None, [], 0
    for axes, flips in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        orientation = np.array(list(zip(axes, flips, strict=True)), dtype=float)
        affine = oblique() @ inv_ornt_aff(orientation, volume.shape)
        path = tmp_path / f"{''.join(map(str, axes))}{flips}.nii.gz"
        nib.save(nib.Nifti1Image(apply_orientation(volume, orientation), affine), path)

        # only the reorientation: a marker in every voxel must return to its position
        scan = read_nifti(path)
        marker = np.arange(volume.size, dtype=np.int32).reshape(volume.shape)
        write_like(tmp_path / "marker.nii.gz", marker, scan)
        back = nib.load(tmp_path / "marker.nii.gz")
        expected = apply_orientation(marker, orientation)
        same_place = np.array_equal(back.affine, nib.load(path).affine)
        exact += np.array_equal(scan.data, volume) and np.array_equal(back.dataobj, expected) and same_place

        (result,) = segment(path, tmp_path / "out", device="cpu")
        labels = nib.load(result.labels)
        assert np.array_equal(labels.affine, nib.load(path).affine) and labels.shape == nib.load(path).shape
        world = np.asarray(nib.as_closest_canonical(labels).dataobj)
        reference = world if reference is None else reference
        agreements.append(float((world == reference).mean()))
    parts = len(np.unique(reference))
    count(
        "orientations", files=48, exact_through_reading_and_writing=exact, least_agreement=min(agreements), parts=parts
    )
    assert exact == 48 and min(agreements) >= 0.999 and parts == 4

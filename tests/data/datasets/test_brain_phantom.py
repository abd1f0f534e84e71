"""Brain phantoms and brain scans as datasets."""

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.datasets.brain_phantom import SHAPE, SPACING_MM, brain_phantom
from diffdiscover3d.data.datasets.brain_scans import BrainScans
from diffdiscover3d.errors import InputError
from diffdiscover3d.workflows.synthesize import write_synthetic


def test_a_phantom_is_a_function_of_split_and_index():
    a, b, other = brain_phantom("test", 1), brain_phantom("test", 1), brain_phantom("train", 1)
    assert np.array_equal(a.volume, b.volume) and np.array_equal(a.labels, b.labels)
    assert not np.array_equal(a.volume, other.volume)


@pytest.mark.parametrize(("index", "low", "high"), [(0, 5, 200), (1, 0.3, 40), (3, 0, 0)])
def test_parts_are_nested_and_lesions_bright(index, low, high):
    phantom = brain_phantom("validation", index)
    brain, lesion = phantom.labels[0] == 1, phantom.labels[1] == 2
    assert phantom.volume.shape == SHAPE and (lesion <= brain).all()
    assert np.array_equal(brain, phantom.volume > 0) and np.array_equal(brain, phantom.healthy > 0)
    assert low <= lesion.sum() * SPACING_MM**3 / 1000 <= high
    if lesion.any():
        assert phantom.volume[lesion].mean() > np.percentile(phantom.volume[brain & ~lesion], 90)
        far = brain & (np.abs(phantom.volume - phantom.healthy) < 1e-6)
        assert far.sum() > 0.5 * brain.sum()
    else:
        assert np.array_equal(phantom.volume, phantom.healthy)


@pytest.mark.parametrize(("split", "index"), [("dev", 0), ("test", -1)])
def test_wrong_requests_are_refused(split, index):
    with pytest.raises(ValueError, match="must"):
        brain_phantom(split, index)


def test_scans_lie_in_their_frames_and_masks_are_left_out(tmp_path):
    phantom = brain_phantom("test", 0)
    padded = np.pad(phantom.volume, ((5, 9), (0, 4), (12, 0)))
    nib.save(nib.Nifti1Image(padded * 100, np.eye(4)), tmp_path / "b_flair.nii.gz")
    nib.save(nib.Nifti1Image(padded[::-1] * 7, np.diag([-1, 1, 1, 1])), tmp_path / "a_flair.nii.gz")
    nib.save(nib.Nifti1Image(phantom.labels[1], np.eye(4)), tmp_path / "b_lesion.nii.gz")
    scans = BrainScans(tmp_path, (32, 36, 32), phantoms=1)
    assert len(scans) == 3 and [scans[i]["name"] for i in range(2)] == ["a_flair.nii.gz", "b_flair.nii.gz"]
    first, second = scans[0], scans[1]
    # the same brain, stored mirrored and in other units: the same item
    np.testing.assert_allclose(first["volume"], second["volume"], atol=1e-4)
    assert first["volume"].shape == (1, 32, 36, 32) and not first["volume"][~first["foreground"]].any()
    assert scans[2]["name"] == "brain-phantom-train-000"
    assert scans.fingerprint() != BrainScans(tmp_path, (32, 36, 32)).fingerprint()
    with pytest.raises(InputError):
        BrainScans(tmp_path / "nowhere", (32, 36, 32))


def test_phantoms_are_written_with_their_truths_and_spacing(tmp_path):
    (path,) = write_synthetic(tmp_path, variant="brain-phantom", split="validation", count=1)
    phantom, image = brain_phantom("validation", 0), nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), phantom.volume)
    np.testing.assert_allclose(image.header.get_zooms(), [SPACING_MM] * 3)
    for level in (1, 2):
        truth = nib.load(tmp_path / f"brain-phantom-validation-000_level-{level}_truth.nii.gz")
        np.testing.assert_array_equal(np.asarray(truth.dataobj), phantom.labels[level - 1])

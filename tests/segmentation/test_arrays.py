"""`segment` with arrays, nibabel and SimpleITK images: labels of the same kind, on the same grid."""

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.errors import InputError
from diffdiscover3d.segmentation.driver import segment
from tests.helpers.volume_files import ORIENTATIONS, stored

sitk = pytest.importorskip("SimpleITK")


@pytest.fixture(scope="module")
def volume():
    values = np.random.default_rng(0).normal(100, 20, (19, 22, 17)).astype(np.float32)
    values[4:12, 5:14, 3:11] += 150
    return values


@pytest.fixture(scope="module")
def labels(volume, tiny_discovery, tmp_path_factory):
    """As from a file."""
    folder = tmp_path_factory.mktemp("file")
    nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "a.nii")
    (result,) = segment(folder / "a.nii", model=str(tiny_discovery))
    return np.asarray(nib.load(result.labels).dataobj)


def test_arrays_and_tensors(volume, labels, tiny_discovery, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = segment(volume, model=str(tiny_discovery))
    assert isinstance(found, np.ndarray) and found.dtype == np.uint8 and np.array_equal(found, labels)
    assert np.array_equal(segment(torch.from_numpy(volume), model=str(tiny_discovery)), labels)
    assert np.array_equal(segment(volume[::-1].astype(">f8")[::-1], model=str(tiny_discovery)), labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7], ids=lambda o: "".join(nib.orientations.ornt2axcodes(o)))
def test_images_in_any_orientation(volume, labels, tiny_discovery, orientation):
    array, affine = stored(orientation, volume)
    expected, _ = stored(orientation, labels)
    image = segment(nib.Nifti1Image(array, affine), model=str(tiny_discovery))
    assert isinstance(image, nib.Nifti1Image) and image.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(image.dataobj), expected) and np.array_equal(image.affine, affine)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    source = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    source.SetSpacing(spacing.tolist())
    source.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    source.SetOrigin(lps[:3, 3].tolist())
    found = segment(source, model=str(tiny_discovery))
    assert np.array_equal(sitk.GetArrayFromImage(found), expected.T)
    assert found.GetOrigin() == source.GetOrigin() and found.GetDirection() == source.GetDirection()


def test_all_levels_of_an_array(volume):
    found = segment(volume, level="all")
    assert list(found) == [1, 2, 3] and all(labels.shape == volume.shape for labels in found.values())
    assert np.array_equal(segment(volume, num_parts=4), found[2])


def test_what_cannot_be_used(volume, tiny_discovery, tmp_path):
    for wrong, word in (
        (volume[0], "3D"),
        (volume * 1j, "complex"),
        (volume * 0, "contrast"),
        (volume * np.nan, "NaN"),
    ):
        with pytest.raises(InputError, match=word):
            segment(wrong, model=str(tiny_discovery))
    with pytest.raises(ValueError, match="in memory"):
        segment(volume, tmp_path, model=str(tiny_discovery))

"""`segment` with arrays, nibabel and SimpleITK images: labels of the same kind, on the same grid."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.errors import InputError, ModelError
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.segmentation.driver import segment
from tests.helpers.loading import counted_loads
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
    (result,) = segment(folder / "a.nii", beside_inputs=True, model=str(tiny_discovery))
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


def test_files_without_an_output(volume, labels, tiny_discovery, tmp_path, monkeypatch):
    """Folders and lists get lists in the order of the volumes, a file gets an image; nothing is left behind."""
    kept = tmp_path / "temporary"
    kept.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(kept))
    affine = np.array([[0, 0, 2, 5], [-1.5, 0, 0, 3], [0, -1.0, 0, 1], [0, 0, 0, 1.0]])
    flipped = volume[::-1].copy()
    for name, values in (("b", volume), ("a", flipped)):
        (tmp_path / "in").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(values, affine if name == "a" else np.eye(4)), tmp_path / "in" / f"{name}.nii.gz")
    before = sorted(tmp_path.rglob("*"))
    one, two = segment(tmp_path / "in", model=str(tiny_discovery))
    assert np.array_equal(two.dataobj, labels) and np.array_equal(one.affine, affine)
    assert one.header.get_intent()[0] == "label"
    single = segment(str(tmp_path / "in" / "b.nii.gz"), model=str(tiny_discovery))
    assert isinstance(single, nib.Nifti1Image) and np.array_equal(single.dataobj, labels)
    mixed = segment([tmp_path / "in" / "b.nii.gz", volume, nib.Nifti1Image(flipped, affine)], model=str(tiny_discovery))
    assert np.array_equal(mixed[0].dataobj, labels) and np.array_equal(mixed[1], labels)
    assert np.array_equal(mixed[2].dataobj, one.dataobj)
    nested = segment([tmp_path / "in" / "b.nii.gz"], level="all")
    assert [list(levels) for levels in nested] == [[1, 2, 3]]
    assert np.array_equal(nested[0][2].dataobj, segment(tmp_path / "in" / "b.nii.gz").dataobj)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="`report` is about files"):
        segment(tmp_path / "in", model=str(tiny_discovery), report=True)


def test_the_model_is_loaded_once(volume, labels, tiny_discovery, tmp_path, monkeypatch):
    """For a list of arrays, images and files, and for several calls with one resolved model."""
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii")
    inputs = [volume, tmp_path / "a.nii", nib.Nifti1Image(volume, np.eye(4)), tmp_path]
    loads = counted_loads(monkeypatch)
    found = segment(inputs, model=str(tiny_discovery))
    assert len(loads) == 1
    arrays = [found[0], *(np.asarray(image.dataobj) for image in (*found[1:3], *found[3]))]
    assert len(arrays) == 4 and all(np.array_equal(array, labels) for array in arrays)
    model = resolve_model(str(tiny_discovery))
    for _ in range(2):
        assert np.array_equal(segment(volume, model=model), labels)
    assert len(loads) == 2 and resolve_model(model) is model
    with pytest.raises(ModelError, match="resolve it again with that one"):
        resolve_model(model, revision="v2")
    network = model.load((None,), torch.device("cpu"))[None]
    assert not network.training and len(loads) == 2
    segment(tmp_path / "a.nii", tmp_path / "out", model=model)
    sidecar = json.loads((tmp_path / "out" / "a_dseg.json").read_text())
    assert sidecar["model"]["id"] == tiny_discovery.name and len(loads) == 2


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


def test_progress_of_volumes_in_memory(volume, tiny_discovery):
    calls, steps = [], ["loading the model", "finding the parts"]
    segment(volume, model=str(tiny_discovery), on_progress=lambda *call: calls.append(call))
    assert calls == [(0, steps[0]), (0.5, steps[0]), (0.5, steps[1]), (1, steps[1])]
    pair = []
    segment([volume, volume], model=str(tiny_discovery), on_progress=lambda *call: pair.append(call))
    halves = [[(share / 2 + start, step) for share, step in calls] for start in (0, 0.5)]
    assert pair == halves[0] + halves[1]

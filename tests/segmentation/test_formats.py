"""One scan in every format gets the same labels, in the family of its format."""

import json

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import LABEL_SUFFIXES
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.workflows.features import extract_features
from diffdiscover3d.workflows.reports import make_reports
from tests.helpers import volume_files as files

pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")
h5py, tifffile = pytest.importorskip("h5py"), pytest.importorskip("tifffile")
pytest.importorskip("mrcfile")
pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def values():
    """A volume (H, W, D) in canonical orientation, with a marked corner."""
    data = np.random.default_rng(2).integers(0, 500, (18, 20, 22)).astype(np.int16)
    data[4:12, 5:14, 6:15] += 300
    data[:3, :2, :4] = 1000
    return data


@pytest.fixture(scope="module")
def expected(values, tiny_discovery):
    return segment(values, model=str(tiny_discovery))


@pytest.mark.parametrize("kind", files.KINDS)
def test_the_same_labels_from_every_format(tmp_path, values, expected, tiny_discovery, kind):
    path = files.write_as(tmp_path, kind, values)
    (result,) = segment(path, tmp_path / "out", model=str(tiny_discovery), statistics=True)
    suffix = {"mrc": ".mrc", "npy": ".npy", "tif": ".tif", "h5": ".h5", "zarr": ".ome.zarr"}.get(kind, ".nii.gz")
    assert result.labels.name.endswith(f"_dseg{suffix}") and suffix in (".nii.gz", *LABEL_SUFFIXES)
    scan, labels = read_volume(path), read_volume(result.labels, allow_constant=True)
    assert np.array_equal(labels.data, expected) and np.allclose(labels.affine, scan.affine, rtol=1e-6)
    before = sorted(tmp_path.rglob("*"))
    image = segment(path, model=str(tiny_discovery))  # without an output: the same labels, and nothing is written
    assert isinstance(image, nib.Nifti1Image) and image.get_data_dtype() == np.uint8
    assert np.array_equal(image.dataobj, labels.to_input_grid(labels.data))
    assert np.allclose(image.affine, labels.header.get_best_affine(), rtol=1e-6)
    assert sorted(tmp_path.rglob("*")) == before
    sidecar = json.loads(result.sidecar.read_text())
    assert len(sidecar["input"]["sha256"]) == 64
    key = {"mrc": "volume_nm3", "npy": None, "tif": None, "h5": None, "zarr": "volume_um3"}.get(kind, "volume_ml")
    assert [name for name in sidecar if name.startswith("volume")] == ([key] if key else [])
    # finished: neither is it done again, nor is it in the way
    skipped = []
    segment(path, tmp_path / "out", model=str(tiny_discovery), statistics=True, resume=True, on_skip=skipped.append)
    assert len(skipped) == 1
    before = read_volume(result.labels, allow_constant=True).data
    segment(path, tmp_path / "out", model=str(tiny_discovery), order="size", overwrite=True)
    again = read_volume(result.labels, allow_constant=True).data
    assert sorted(np.bincount(again.astype(int).ravel())) == sorted(np.bincount(before.astype(int).ravel()))


@pytest.mark.parametrize("kind", ["dicom", "mrc", "zarr"])
def test_features_and_reports_take_every_format(tmp_path, values, tiny_discovery, kind):
    path = files.write_as(tmp_path, kind, values)
    segment(path, tmp_path / "out", model=str(tiny_discovery))
    (page,) = make_reports(str(path), parts=tmp_path / "out")
    text = page.read_text()
    assert {"dicom": "mL", "mrc": "nm³", "zarr": "µm³"}[kind] in text
    assert ("centre R, A, S" in text) == (kind == "dicom")
    assert "checked>" in text and text.count('type="checkbox"') == text.count(" checked>") + 1  # but the convention
    (features,) = extract_features(path, tmp_path / "features", stages=(3,))
    found = read_volume(features, volume=0, allow_constant=True)
    scan = read_volume(path)
    # the features lie over the same part of space
    extent = [np.array(v.shape) * v.spacing_mm for v in (found, scan)]
    assert np.all(extent[0] >= extent[1] * 0.9) and np.all(extent[0] <= extent[1] * 2.2)


def test_one_series_of_a_folder_is_resumed(tmp_path, values, expected, tiny_discovery):
    for uid, number, data in (("1.2.9", 9, values[::-1]), ("1.2.10", 10, values)):
        array, affine = files.stored(files.CANONICAL, data)
        files.write_dicom(tmp_path / "MR", array, affine, uid=uid, number=number)
    skipped, options = [], {"model": str(tiny_discovery), "series": "10"}
    (result,) = segment(tmp_path / "MR", tmp_path / "out", **options)
    assert result.labels.name == "MR_series-10_dseg.nii.gz"
    labels = read_volume(result.labels, allow_constant=True)
    assert np.array_equal(labels.data, expected)
    assert segment(tmp_path / "MR", tmp_path / "out", resume=True, on_skip=skipped.append, **options) == []
    assert len(skipped) == 1

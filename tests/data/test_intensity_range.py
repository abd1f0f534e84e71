"""Notes about outliers and fill values, and values that float32 cannot hold."""

import gzip
import logging

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.datasets.folder import VolumeFolder
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.intensity_range import describe_range
from diffdiscover3d.errors import InputError
from diffdiscover3d.training.data_check import read_all
from tests.helpers.opened_scans import open_scan, open_slabs

SHAPE = (20, 16, 24)


def bumps():
    i, j, k = np.indices(SHAPE)
    return 500 + 100 * np.sin(i / 3) * np.cos(j / 4) + 3 * k + np.random.default_rng(0).normal(0, 5, SHAPE)


def notes_on(values):
    return describe_range(values, values.min(), values.max())


def test_ordinary_scans_get_no_note():
    values = bumps()
    brain = np.where(values > 520, values, 518)  # a background just below the tissue
    coarse = np.round(values / 100)  # few grey levels
    edge = np.linspace(0, 1, values.size).reshape(SHAPE)
    for plain in (values, values.astype(np.int16), brain, coarse, edge, np.clip(values, 450, 600)):
        assert notes_on(plain) == []
    assert notes_on(np.full(SHAPE, 3.0)) == []


def test_a_binary_image_gets_no_note():
    image = np.zeros((12, 10, 8), dtype=np.float32)
    image[3:6, 2:7, 1:5] = 1
    assert notes_on(image) == []


@pytest.mark.parametrize(("voxels", "value", "side"), [(1, 5e8, "above"), (10, 5e4, "above"), (3, -1e6, "below")])
def test_a_few_voxels_that_rule_the_range(voxels, value, side):
    values = bumps()
    values.flat[np.arange(voxels) * (values.size // voxels)] = value
    (note,) = notes_on(values)
    assert side in note and "rule the intensity range" in note and f"{value:g}" in note


@pytest.mark.parametrize(("value", "name"), [(-32768, "lowest"), (0, "lowest"), (3071, "highest")])
def test_a_fill_value(value, name):
    values = bumps()
    values[:4] = value  # a fifth of the first axis
    (note,) = notes_on(values)
    assert f"20 % of the voxels have the {name} value, {value:g}" in note


def test_a_fill_value_and_an_outlier():
    values = bumps()
    values[:4], values[10, 10, 10] = -1024, 1e4
    padding, outlier = notes_on(values)
    assert "lowest value, -1024" in padding and "10000" in outlier


@pytest.mark.parametrize(
    ("dtype", "offset", "scaled"),
    [(np.int32, 2**30, False), (np.uint32, 2**31, False), (np.float64, 1e9, False), (np.int32, 2**30, True)],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("nan_to_zero", [False, True])  # there are no NaN voxels
def test_a_large_offset_is_read_exactly(tmp_path, make_nifti, dtype, offset, scaled, ending, nan_to_zero):
    values = np.round(bumps()) - 300

    path = make_nifti(tmp_path / "scan.nii", (values + offset).astype(dtype), np.eye(4))
    if scaled:  # written into the header, since nibabel would divide the values
        raw = bytearray(path.read_bytes())
        raw[112:120] = np.array([0.5, 7], "<f4").tobytes()
        path.write_bytes(raw)
    if ending == ".nii.gz":
        path = path.with_name("scan.nii.gz")
        path.write_bytes(gzip.compress((tmp_path / "scan.nii").read_bytes()))
    whole = read_nifti(path, nan_to_zero=nan_to_zero)
    expected = (values - values.min()) * (0.5 if scaled else 1)
    np.testing.assert_array_equal(whole.data, expected)
    (note,) = [n for n in whole.notes if "was subtracted" in n]
    lowest = (values.min() + offset) * (0.5 if scaled else 1) + (7 if scaled else 0)
    assert f"{lowest:.10g}" in note
    with open_slabs(path, tmp_path, nan_to_zero=nan_to_zero) as scan:
        np.testing.assert_array_equal(scan.read(tuple(slice(0, n) for n in SHAPE)), expected)
        assert note in scan.notes and (scan.low, scan.high) == (0, expected.max())


def write_float64(folder, ending, values):
    path = folder / f"scan{ending}"
    if ending == ".npy":
        np.save(path, values)
    else:
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    return path


@pytest.mark.parametrize("ending", [".nii", ".npy"])
def test_an_offset_is_kept_where_nan_becomes_0(tmp_path, ending):
    values = np.round(bumps()) - 300 + 1e9
    values[3, 4, 5] = np.nan
    path = write_float64(tmp_path, ending, values)
    expected = np.nan_to_num(values, nan=0).astype(np.float32)
    np.testing.assert_array_equal(read_volume(path, nan_to_zero=True).data, expected)
    with open_scan(path, tmp_path, nan_to_zero=True) as scan:
        np.testing.assert_array_equal(scan.read(tuple(slice(0, n) for n in SHAPE)), expected)


@pytest.mark.parametrize("ending", [".nii", ".npy"])
@pytest.mark.parametrize("nan_to_zero", [False, True])
def test_values_beyond_float32_are_named(tmp_path, ending, nan_to_zero):
    values = bumps()
    values[0, 0, :7], values[1, 1, 1] = 1e300, np.nan
    path = write_float64(tmp_path, ending, values)
    message = "7 voxels exceed the range of 32-bit numbers, 3.4e38; rescale the scan"
    with pytest.raises(InputError, match=message):
        read_volume(path, nan_to_zero=nan_to_zero)
    reading = {"nan_to_zero": nan_to_zero}
    with pytest.raises(InputError, match=message), open_scan(path, tmp_path, **reading):
        pass


def test_values_that_float32_holds_are_read_as_they_are(tmp_path, make_nifti):
    values = np.round(bumps()) + 60_000
    for name, dtype in (("i", np.int32), ("f", np.float32)):
        scan = read_nifti(make_nifti(tmp_path / f"{name}.nii", values.astype(dtype), np.eye(4)))
        np.testing.assert_array_equal(scan.data, values)
        assert scan.notes == ()
    constant = make_nifti(tmp_path / "constant.nii", np.full(SHAPE, 2**30, np.int32), np.eye(4))
    with pytest.raises(InputError, match="no contrast"):
        read_nifti(constant)
    assert read_nifti(constant, allow_constant=True).data.max() == 2**30


@pytest.fixture
def three_scans(tmp_path, make_nifti):
    for index in range(3):
        values = bumps().astype(np.float32)
        if index == 1:
            values[3, 4, 5] = 1e9
        make_nifti(tmp_path / "scans" / f"sub-{index}.nii", values, np.eye(4))
    return tmp_path / "scans"


def test_a_training_logs_the_notes(three_scans, caplog):
    from accelerate import Accelerator

    volumes = VolumeFolder(three_scans)
    with caplog.at_level(logging.INFO, logger="diffdiscover3d"):
        read_all(volumes, Accelerator(cpu=True))
    (line,) = [m for m in caplog.messages if "note" in m]
    assert line.startswith("sub-1.nii: note: ") and "rule the intensity range" in line


def test_a_scan_that_changes_between_epochs(three_scans, monkeypatch):
    monkeypatch.setattr("diffdiscover3d.data.datasets.folder._CACHE_BYTES", 0)
    volumes = VolumeFolder(three_scans)
    assert volumes[2]["volume"].shape == (1, *SHAPE)
    before, path = volumes.fingerprint(), three_scans / "sub-2.nii"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2  # the size, and the first and last 4 KiB, stay
    data[middle : middle + 400] = bytes(reversed(data[middle : middle + 400]))
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"sub-2\.nii: has changed since the training began"):
        volumes[2]
    assert volumes[0]["volume"].max() == 1
    assert VolumeFolder(three_scans).fingerprint() != before  # a resumed training finds it as well

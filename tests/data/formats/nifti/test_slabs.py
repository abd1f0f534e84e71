"""Scans read slab by slab against the same files read into memory."""

import gzip
import os
import shutil
import struct
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.formats.nifti import raw_grid, slabs
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.errors import InputError, OutputError
from tests.data.formats.nifti.test_payload import bomb
from tests.helpers.corpus import CORPUS, blobs
from tests.helpers.opened_scans import open_slabs


def everything(scan) -> np.ndarray:
    return scan.read(tuple(slice(0, n) for n in scan.shape))


def outcome(call):
    try:
        return call()
    except (InputError, OutputError) as error:
        return type(error), str(error)


def by_slabs(path, **reading):
    with open_slabs(path, path.parent, **reading) as scan:
        return everything(scan), scan.notes, scan.affine, scan.low, scan.high


def whole(path, **reading):
    scan = read_nifti(path, **reading)
    return scan.data, scan.notes, scan.affine, scan.data.min(), scan.data.max()


@pytest.mark.parametrize("reading", [{}, {"nan_to_zero": True, "ignore_affine": True}, {"volume": 0}])
@pytest.mark.parametrize("name", CORPUS)
def test_it_reads_and_refuses_what_reading_whole_does(tmp_path, monkeypatch, name, reading):
    monkeypatch.setattr(raw_grid, "SLAB_VOXELS", 300)
    write, _ = CORPUS[name]
    write(tmp_path / name)
    mine, theirs = (outcome(lambda read=read: read(tmp_path / name, **reading)) for read in (by_slabs, whole))
    if isinstance(theirs[0], type):
        assert mine == theirs
    else:
        for one, two in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, two)
    assert [p.name for p in tmp_path.iterdir()] == ([name] if (tmp_path / name).exists() else [])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("number", [0, 2])
def test_one_of_several_volumes(tmp_path, make_nifti, suffix, number):
    series = np.stack([blobs() + 10 * i for i in range(6)], axis=-1).reshape(*blobs().shape, 2, 3).astype(">i2")
    path = make_nifti(tmp_path / f"a{suffix}", series)
    with open_slabs(path, tmp_path, volume=number) as scan:
        np.testing.assert_array_equal(everything(scan), read_nifti(path, volume=number).data)
        assert scan.notes == (f"volume {number} of 6 in a 5-D file",)
        normal = scan.normalized(tuple(slice(0, n) for n in scan.shape))
        assert (normal.min(), normal.max(), normal.dtype) == (0, 1, np.float32)
    for volume in (None, 6):
        with pytest.raises(InputError, match="volume"), open_slabs(path, tmp_path, volume=volume):
            pass


def test_scaled_and_turned(tmp_path):
    stored = nib.Nifti1Image(
        blobs().astype(np.int16), np.array([[0, 0, 3, 0], [-1.5, 0, 0, 0], [0, -2, 0, 0.0], [0, 0, 0, 1]])
    )
    raw = bytearray(stored.to_bytes())
    struct.pack_into("<ff", raw, 112, 0.1, -3)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(bytes(raw)))
    with open_slabs(path, tmp_path) as scan:
        np.testing.assert_array_equal(everything(scan), read_nifti(path).data)
        assert scan.spacing_mm == read_nifti(path).spacing_mm


def test_decompressed_voxels_have_no_name_and_are_gone(tmp_path, make_nifti):
    path = make_nifti(tmp_path / "in" / "a.nii.gz", blobs().astype(np.float32))
    scratch = tmp_path / "not" / "there"  # not yet: the nearest existing folder above it is used
    with open_slabs(path, scratch) as scan:
        file = scan.grid.file
        assert [p.name for p in tmp_path.iterdir()] == ["in"] and not file.closed
    assert file.closed
    with pytest.raises(KeyboardInterrupt), open_slabs(path, scratch) as scan:
        raise KeyboardInterrupt
    assert scan.grid.file.closed and [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_is_too_small_or_fills(tmp_path, make_nifti, monkeypatch):
    path = make_nifti(tmp_path / "a.nii.gz", blobs().astype(np.float32))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with (
        pytest.raises(OutputError, match=r"0\.0 GiB of temporary space are needed.*choose another output folder"),
        open_slabs(path, tmp_path),
    ):
        pass
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slabs, "write_all", full)
    with pytest.raises(OutputError, match="No space left"), open_slabs(path, tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    values = blobs().astype(np.float32)
    (tmp_path / "a.nii.gz").write_bytes(bomb(nib.Nifti1Image(values, np.eye(4)).to_bytes(), 100))
    with open_slabs(tmp_path / "a.nii.gz", tmp_path) as scan:
        assert scan.grid.file.seek(0, 2) == values.nbytes
        np.testing.assert_array_equal(everything(scan), values)


def test_a_file_that_shrinks_is_the_inputs_fault(tmp_path, make_nifti):
    path = make_nifti(tmp_path / "a.nii", blobs().astype(np.float32))
    with open_slabs(path, tmp_path) as scan:
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(InputError, match=r"a\.nii.*truncated while it was read.*copy it again"):
            everything(scan)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_that_changes_is_detected(tmp_path, make_nifti, suffix):
    """A voxel is changed in place and the time stamp restored."""
    path = make_nifti(tmp_path / f"a{suffix}", blobs().astype(np.float32))
    with open_slabs(path, tmp_path) as scan:
        scan.check_unchanged()
        before, stat = everything(scan), path.stat()
        with open(path, "r+b") as file:
            file.seek(-4, 2)
            file.write(b"\x07\x07\x07\x07")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if suffix == ".nii.gz":  # its voxels are read from a copy
            scan.check_unchanged()
            np.testing.assert_array_equal(everything(scan), before)
        else:
            with pytest.raises(InputError, match=r"a\.nii: changed while it was being read"):
                scan.check_unchanged()

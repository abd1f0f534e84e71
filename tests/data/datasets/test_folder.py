"""Folders, globs and lists of volumes."""

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.data.datasets.folder import VolumeFolder
from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.errors import InputError


def ramp(shape=(4, 5, 6), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path, make_nifti):
    make_nifti(tmp_path / "scans" / "b.nii.gz", ramp(seed=1))
    make_nifti(tmp_path / "scans" / "a.nii", ramp(seed=2))
    make_nifti(tmp_path / "scans" / "deep" / "c.nii.gz", ramp(seed=3), np.diag([-2.0, 2.0, 3.0, 1.0]))
    make_nifti(tmp_path / "scans" / "a_dseg.nii.gz", ramp().astype(np.uint8))  # a result of this package
    make_nifti(tmp_path / "scans" / "._b.nii.gz", ramp())  # AppleDouble file of macOS
    make_nifti(tmp_path / "scans" / ".diffdiscover3d.x1" / "half_stage1.nii.gz", ramp())  # killed process
    (tmp_path / "scans" / "notes.txt").write_text("no scan")
    (tmp_path / "scans" / "named.nii.gz").mkdir()
    return tmp_path / "scans"


def names(paths) -> list[str]:
    return [p.name for p in paths]


def test_folder_with_subfolders(folder):
    assert names(list_volumes(folder)) == ["a.nii", "b.nii.gz", "c.nii.gz"]


def test_glob(folder):
    assert names(list_volumes(f"{folder}/*.nii")) == ["a.nii"]
    assert names(list_volumes(f"{folder}/**/[bc].nii.gz")) == ["b.nii.gz", "c.nii.gz"]


def test_single_file(folder):
    assert list_volumes(folder / "a.nii") == [folder / "a.nii"]
    assert list_volumes(str(folder / "a_dseg.nii.gz")) == [folder / "a_dseg.nii.gz"]  # explicitly given


def test_text_list(folder):
    text = folder.parent / "list.txt"
    text.write_text(f"# scans\n\nscans/b.nii.gz  # the second\r\n{folder}/deep/c.nii.gz\n", encoding="utf-8")
    assert list_volumes(text) == [folder / "b.nii.gz", folder / "deep" / "c.nii.gz"]


def test_text_list_with_missing_files(folder):
    text = folder.parent / "list.txt"
    text.write_text("scans/b.nii.gz\nscans/x.nii.gz\nscans/y.nii.gz\n")
    with pytest.raises(InputError, match=r"list\.txt: lists 2 file\(s\).*x\.nii\.gz"):
        list_volumes(text)


@pytest.mark.parametrize("content", [b"\xff\xfe\x80 binary", b"word " * 5000, b"a\0b\n", b"", b"# nothing\n\n"])
def test_files_that_are_no_list(tmp_path, content):
    path = tmp_path / "scan.dat"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.dat") as caught:
        list_volumes(path)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_nothing_found(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere", f"{tmp_path}/*.nii.gz"):
        with pytest.raises(InputError, match="no volumes; give a folder"):
            list_volumes(source)


def test_volumes_are_canonical_and_normalised(folder):
    volumes = VolumeFolder(folder)
    assert len(volumes) == 3
    assert [volumes[i]["name"] for i in range(3)] == ["a.nii", "b.nii.gz", "c.nii.gz"]
    for i, item in enumerate(volumes):
        oracle = nib.as_closest_canonical(nib.load(volumes.paths[i])).get_fdata()
        oracle = (oracle - oracle.min()) / (oracle.max() - oracle.min())
        assert item["volume"].dtype == torch.float32 and item["volume"].shape == (1, 4, 5, 6)
        np.testing.assert_allclose(item["volume"][0].numpy(), oracle, atol=1e-6)
    with pytest.raises(IndexError):
        volumes[3]


def test_volumes_are_read_once_within_the_memory_allowed(folder, monkeypatch):
    import diffdiscover3d.data.datasets.folder as module

    read = []
    original = module.read_volume
    monkeypatch.setattr(module, "read_volume", lambda path: read.append(path.name) or original(path))
    monkeypatch.setattr(module, "_CACHE_BYTES", 2 * 4 * 5 * 6 * 4)  # two volumes of float32
    volumes = VolumeFolder(folder)
    for _ in range(2):
        for i in range(3):
            volumes[i]
    assert read == ["a.nii", "b.nii.gz", "c.nii.gz", "c.nii.gz"]


def test_bad_file_is_named_on_access(folder):
    (folder / "a.nii").write_bytes(b"")
    volumes = VolumeFolder(folder)
    with pytest.raises(InputError, match=r"a\.nii"):
        volumes[0]
    assert volumes[1]["name"] == "b.nii.gz"

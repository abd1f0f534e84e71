"""What a folder of mixed formats holds, and what is left out and why."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.datasets.folder import VolumeFolder
from diffdiscover3d.data.datasets.listing import describe_left_out, list_volumes, look_into
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import folder_of, stem, volume_sha256
from diffdiscover3d.errors import InputError
from tests.helpers import volume_files as files

pytest.importorskip("SimpleITK")
pytest.importorskip("pydicom")
tifffile = pytest.importorskip("tifffile")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with nearly everything."""
    folder = tmp_path_factory.mktemp("mixed")
    array, affine = files.stored(files.CANONICAL)
    array = array.astype(np.int16)
    files.write_mgh(folder / "brain.mgz", array.astype(np.float32), affine)
    files.write_sitk(folder / "head.nrrd", array, affine)
    files.write_sitk(folder / "mr.mhd", array, affine)  # and mr.raw
    nib.save(nib.Spm2AnalyzeImage(array, affine), folder / "old.img")  # and old.hdr, old.mat
    for name in ("scan.nii.gz", "scan_lesion.nii.gz", "scan_dseg.nii.gz", "T1_brainmask.nii.gz", "segovia.nii.gz"):
        nib.save(nib.Nifti1Image(array, affine), folder / name)
    tifffile.imwrite(folder / "cells.tif", files.phantom().astype(np.uint16))
    files.write_ome_zarr(folder / "deep" / "embryo.ome.zarr", files.phantom())
    files.write_dicom(folder / "patient" / "CT", array, affine)
    files.write_dicom(folder / "patient" / "MR", array, affine, uid="1.2.9", number=9)
    files.write_dicom(folder / "patient" / "MR", array, affine, uid="1.2.10", number=10)
    files.write_dicom(folder / "patient" / "MR", array, affine, uid="1.2.11", number=11, skip=(5,))
    (folder / "readme.txt").write_text("hello")
    return folder


def test_all_volumes_are_found_and_the_rest_is_named(mixed):
    found = look_into(mixed)
    assert [str(p.relative_to(mixed)) for p in found.volumes] == [
        "brain.mgz",
        "cells.tif",
        "deep/embryo.ome.zarr",
        "head.nrrd",
        "mr.mhd",
        "old.hdr",
        "patient/CT",
        "patient/MR::1.2.10",
        "patient/MR::1.2.9",
        "scan.nii.gz",
        "segovia.nii.gz",
    ]
    left_out = {p.name: reason for p, reason in found.left_out}
    assert left_out.pop("series 11").startswith("a DICOM series that lacks about 1 slice(s)")
    assert left_out == {
        "scan_dseg.nii.gz": "a result of this program by its name or sidecar; --include PATTERN takes it",
        "scan_lesion.nii.gz": "named like a mask; --include PATTERN takes it",
        "T1_brainmask.nii.gz": "named like a mask; --include PATTERN takes it",
    }
    assert found.others == 3  # readme.txt, mr.raw, old.mat
    assert (
        "left out: T1_brainmask.nii.gz and 1 more: named like a mask; --include PATTERN takes it"
        in describe_left_out(found)
    )


def test_every_listed_volume_opens_and_has_a_name_of_its_own(mixed):
    volumes = list_volumes(mixed)
    for path in volumes:
        assert np.array_equal(np.sort(read_volume(path).data.ravel()), np.sort(files.phantom().ravel()))
        assert len(volume_sha256(path)) == 64
    names = [stem(p) for p in volumes]
    assert len(set(names)) == len(names)
    assert {"CT", "MR_series-9", "MR_series-10", "embryo", "cells", "old"} <= set(names)
    assert folder_of(volumes[6]) == mixed / "patient"


def test_include_takes_what_is_named_like_a_mask(mixed):
    names = [p.name for p in list_volumes(mixed, include=["*_lesion*"])]
    assert "scan_lesion.nii.gz" in names and "T1_brainmask.nii.gz" not in names


def test_masks_alone_are_volumes(tmp_path):
    nib.save(nib.Nifti1Image(files.phantom(), np.eye(4)), tmp_path / "a_mask.nii.gz")
    assert [p.name for p in list_volumes(tmp_path)] == ["a_mask.nii.gz"]


def test_a_series_is_chosen(mixed):
    for wanted in ("10", "1.2.10"):
        found = look_into(mixed / "patient" / "MR", series=wanted)
        assert found.volumes == (mixed / "patient" / "MR::1.2.10",)
    # a folder with one series without a fault is named by itself
    assert look_into(mixed / "patient" / "CT", series="3").volumes == (mixed / "patient" / "CT",)
    with pytest.raises(InputError, match="no volume in it can be used"):
        list_volumes(mixed / "patient" / "MR", series="77")


def test_a_list_may_name_anything(mixed, tmp_path):
    text = tmp_path / "list.txt"
    text.write_text(f"{mixed}/patient/MR::1.2.9\n{mixed}/deep/embryo.ome.zarr\n{mixed}/brain.mgz\n")
    volumes = VolumeFolder(text)
    assert [v["name"] for v in volumes] == ["brain.mgz", "embryo.ome.zarr", "MR::1.2.9"]
    assert all(v["volume"].shape[0] == 1 and v["volume"].max() == 1 for v in volumes)
    before = volumes.fingerprint()
    chunk = next(p for p in sorted((mixed / "deep" / "embryo.ome.zarr" / "0" / "c").rglob("*")) if p.is_file())
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1])
    assert VolumeFolder(text).fingerprint() != before
    chunk.write_bytes(whole)
    assert VolumeFolder(text).fingerprint() == before


def test_a_missing_dicom_library_does_not_hide_other_volumes(mixed, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pydicom", None)
    from diffdiscover3d.data.formats import registry

    registry._dicom_in.cache_clear()
    found = look_into(mixed)
    assert Path("patient") not in {p.parent for p in found.volumes} and len(found.volumes) == 8
    assert any("pip install" in reason for _, reason in found.left_out)
    with pytest.raises(InputError, match=r'pip install "diffdiscover3d\[dicom\]"'):
        list_volumes(mixed / "patient")
    registry._dicom_in.cache_clear()

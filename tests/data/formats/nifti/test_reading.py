"""Reading and writing NIfTI, with nibabel as the oracle."""

import gzip
import itertools
import os
import struct
import time
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff

from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.formats.nifti.reading import as_volume_tensor, read_nifti, write_like, write_volume
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.errors import InputError, MemoryLimitError, OutputError
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.preflight import refuse_early

SHAPE = (5, 6, 7)
ORIENTATIONS = [
    (axes, flips) for axes in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]


def oblique() -> np.ndarray:
    """Voxels of 1.5 x 2 x 3 mm, rotated about two axes."""
    a, b = np.deg2rad([12, -7])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([1.5, 2.0, 3.0])
    affine[:3, 3] = (-20, 11, 5)
    return affine


def integers(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(5).permutation(int(np.prod(shape))).reshape(shape)


def float_bytes(make_nifti, folder) -> bytearray:
    """An uncompressed float32 file whose header is then damaged by the tests."""
    return bytearray(make_nifti(folder / "whole.nii", integers().astype(np.float32)).read_bytes())


def patched(make_nifti, folder, offset, layout, *values):
    raw = float_bytes(make_nifti, folder)
    struct.pack_into(layout, raw, offset, *values)
    path = folder / "patched.nii.gz"
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_every_orientation_reads_canonical_and_writes_back(tmp_path, axes, flips):
    base, affine = integers().astype(np.int16), oblique()
    ornt = np.array([[axis, flip] for axis, flip in zip(axes, flips, strict=True)], dtype=float)
    stored = apply_orientation(base, ornt)
    stored_affine = affine @ inv_ornt_aff(ornt, base.shape)
    image = nib.Nifti1Image(stored, stored_affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(stored_affine, 1)
    image.set_qform(stored_affine, 3)
    path = tmp_path / "in.nii.gz"
    nib.save(image, path)

    scan = read_nifti(path)
    oracle = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(scan.data, oracle.get_fdata())
    np.testing.assert_allclose(scan.affine, oracle.affine, atol=1e-6)
    np.testing.assert_array_equal(scan.data, base)  # canonical by construction
    np.testing.assert_allclose(scan.spacing_mm, (1.5, 2.0, 3.0), rtol=1e-6)
    np.testing.assert_array_equal(scan.to_input_grid(scan.data), stored)

    labels = (scan.data % 7).astype(np.uint8)  # labels that identify positions
    write_like(tmp_path / "out.nii.gz", labels, scan, labels=True)
    back, source = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
    np.testing.assert_array_equal(np.asarray(back.dataobj), stored % 7)
    np.testing.assert_array_equal(back.affine, source.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_x", "srow_y", "srow_z", "dim", "dim_info"):
        np.testing.assert_array_equal(back.header[field], source.header[field], err_msg=field)
    for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        assert back.header[field] == source.header[field], field


def encodings(folder, make_nifti):
    """The same integers in many encodings."""
    values = integers()
    whole = values.astype(np.float32)
    yield make_nifti(folder / "f4.nii", whole)
    yield make_nifti(folder / "f4.nii.gz", whole)
    yield make_nifti(folder / "f8.nii.gz", values.astype(np.float64))
    yield make_nifti(folder / "i4.nii", values.astype(np.int32))
    yield make_nifti(folder / "u2.nii", values.astype(np.uint16))
    yield make_nifti(folder / "nifti2.nii", whole, kind=nib.Nifti2Image)
    yield make_nifti(folder / "nifti2.nii.gz", whole, kind=nib.Nifti2Image)
    for dtype in ("i2", "f4", "f8"):
        header = nib.Nifti1Header(endianness=">")
        header.set_data_dtype(f">{dtype}")
        image = nib.Nifti1Image(values.astype(f">{dtype}"), np.diag([2.0, 2.0, 3.0, 1.0]), header)
        nib.save(image, folder / f"big-{dtype}.nii.gz")
        assert nib.load(folder / f"big-{dtype}.nii.gz").header.endianness == ">"
        yield folder / f"big-{dtype}.nii.gz"
    for dtype in (np.int16, np.float32):  # a stored value v represents 0.5 v - 3
        path = make_nifti(folder / f"scaled-{np.dtype(dtype)}.nii", (2 * (values + 3)).astype(dtype))
        raw = bytearray(path.read_bytes())
        struct.pack_into("<ff", raw, 112, 0.5, -3)
        path.write_bytes(raw)
        yield path


def test_encodings_give_equal_data(tmp_path, make_nifti):
    count = 0
    for path in encodings(tmp_path, make_nifti):
        scan = read_nifti(path)
        assert scan.data.dtype == np.float32 and scan.data.flags.c_contiguous
        np.testing.assert_array_equal(scan.data, integers(), err_msg=path.name)
        np.testing.assert_array_equal(scan.data, nib.load(path).get_fdata(), err_msg=path.name)
        assert scan.notes == ()
        count += 1
    assert count == 12


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_scaling_is_done_in_double_precision(tmp_path, make_nifti, dtype):
    path = make_nifti(tmp_path / "a.nii", np.random.default_rng(0).integers(0, 250, SHAPE).astype(dtype))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<ff", raw, 112, 0.1, 1000.7)
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_nifti(path).data, nib.load(path).get_fdata().astype(np.float32))


@pytest.mark.parametrize(("slope", "inter"), [(0, 0), (0, 5), (np.nan, 0), (np.inf, 0), (-np.inf, 2), (2, np.nan)])
def test_unusable_slope_means_values_as_stored(tmp_path, make_nifti, slope, inter):
    path = patched(make_nifti, tmp_path, 112, "<ff", slope, inter)
    scan = read_nifti(path)
    np.testing.assert_array_equal(scan.data, integers())
    assert any("slope" in note for note in scan.notes)


def test_label_map_header(tmp_path, make_nifti):
    def mod(header):
        header.set_slope_inter(0.5, -3)
        header.set_dim_info(freq=0, phase=1, slice=2)
        header.set_xyzt_units("mm", "sec")
        header["descrip"] = b"Jane Doe 1970-01-01"
        header["cal_max"] = 99

    path = make_nifti(tmp_path / "in.nii.gz", integers().astype(np.int16), oblique(), mod)
    scan = read_nifti(path)
    labels = (scan.data % 3).astype(np.uint8)
    write_like(tmp_path / "out.nii.gz", labels, scan, labels=True)
    write_like(tmp_path / "again.nii.gz", labels, scan, labels=True)
    write_like(tmp_path / "out.nii", labels, scan, labels=True)
    assert (tmp_path / "out.nii.gz").read_bytes() == (tmp_path / "again.nii.gz").read_bytes()
    raw = (tmp_path / "out.nii").read_bytes()
    assert gzip.decompress((tmp_path / "out.nii.gz").read_bytes()) == raw
    assert struct.unpack_from("<h", raw, 68) == (1002,)  # intent_code LABEL
    assert struct.unpack_from("<hh", raw, 70) == (2, 8)  # datatype uint8, bitpix
    assert struct.unpack_from("<fff", raw, 108) == (352.0, 1.0, 0.0)  # vox_offset, slope, inter
    assert struct.unpack_from("<ff", raw, 124) == (0.0, 0.0)  # the display window of the scan is not copied
    assert b"Jane" not in raw and len(raw) == 352 + labels.size
    before, after = nib.load(path).header, nib.load(tmp_path / "out.nii").header
    for field in ("dim", "pixdim", "dim_info", "xyzt_units", "srow_x", "srow_y", "srow_z", "qform_code", "sform_code"):
        np.testing.assert_array_equal(after[field], before[field], err_msg=field)
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii").get_fdata(), labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.nii.gz", "in.nii.gz", "out.nii", "out.nii.gz"]


def test_features_and_images_are_written_unlabelled(tmp_path, make_nifti):
    affine = oblique()[:, [1, 0, 2, 3]] * (1, -1, 1, 1)
    scan = read_nifti(make_nifti(tmp_path / "in.nii", integers().astype(np.float32), affine))
    features = np.stack([scan.data, -scan.data], axis=-1)
    write_like(tmp_path / "out.nii.gz", features, scan)
    back = nib.load(tmp_path / "out.nii.gz")
    assert back.header["intent_code"] == 0 and back.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.stack([integers(), -integers()], axis=-1))
    np.testing.assert_array_equal(back.affine, nib.load(tmp_path / "in.nii").affine)


def test_nifti2_and_big_endian_stay_what_they_are(tmp_path, make_nifti):
    for path in encodings(tmp_path, make_nifti):
        if "nifti2" in path.name or "big" in path.name:
            scan = read_nifti(path)
            labels = (scan.data % 5).astype(np.uint8)
            target = tmp_path / "out.nii"
            write_like(target, labels, scan, labels=True)
            back, source = nib.load(target), nib.load(path)
            assert type(back) is type(source) and back.header.endianness == source.header.endianness
            np.testing.assert_array_equal(np.asarray(back.dataobj), labels)
            np.testing.assert_array_equal(back.affine, source.affine)
            assert back.header["intent_code"] == 1002


def test_write_volume(tmp_path):
    write_volume(tmp_path / "a.nii.gz", integers().astype(np.float32))
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image.affine, np.eye(4))
    assert image.header.get_xyzt_units()[0] == "mm" and image.header["sform_code"] > 0
    array = integers((4, 5, 9)).astype(np.uint8) % 4
    canonical = nib.as_closest_canonical(nib.Nifti1Image(array, np.diag([-2.0, 3.0, 4.0, 1.0])))
    write_volume(tmp_path / "b.nii.gz", np.asarray(canonical.dataobj), canonical.affine, labels=True)
    image = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), array[::-1])
    np.testing.assert_allclose(image.affine, canonical.affine)
    assert image.header["intent_code"] == 1002


def test_write_into_a_file_is_an_output_error(tmp_path, make_nifti):
    scan = read_nifti(make_nifti(tmp_path / "in.nii", integers().astype(np.float32)))
    with pytest.raises(OutputError, match=r"in\.nii"):
        write_like(tmp_path / "in.nii" / "out.nii.gz", scan.data, scan)


# unusual geometry


def test_sheared_affine_goes_on(tmp_path, make_nifti):
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 1] = 1
    path = make_nifti(tmp_path / "in.nii.gz", integers().astype(np.float32), affine)
    scan = read_nifti(path)
    assert any("sheared" in note for note in scan.notes)
    np.testing.assert_array_equal(scan.data, nib.as_closest_canonical(nib.load(path)).get_fdata())
    write_like(tmp_path / "out.nii.gz", scan.data, scan)
    np.testing.assert_array_equal(nib.load(tmp_path / "out.nii.gz").affine, affine)


def test_both_codes_zero_go_on_and_are_written_back(tmp_path, make_nifti):
    scan = read_nifti(patched(make_nifti, tmp_path, 252, "<hh", 0, 0))
    assert any("neither sform nor qform" in note for note in scan.notes)
    np.testing.assert_allclose(scan.spacing_mm, (2, 2, 3))
    labels = (scan.data % 3).astype(np.uint8)
    write_like(tmp_path / "out.nii", labels, scan, labels=True)
    back = nib.load(tmp_path / "out.nii")
    assert (back.header["qform_code"], back.header["sform_code"]) == (0, 0)
    np.testing.assert_array_equal(np.asarray(back.dataobj), scan.to_input_grid(labels))
    np.testing.assert_array_equal(back.affine, nib.load(tmp_path / "patched.nii.gz").affine)


@pytest.mark.parametrize(("factor", "noted"), [(1.001, False), (1.3, True)])
def test_sform_unlike_qform_is_noted(tmp_path, factor, noted):
    affine = oblique()
    image = nib.Nifti1Image(integers().astype(np.float32), affine)
    image.set_qform(affine, 1)
    larger = affine.copy()
    larger[:3] *= factor
    image.set_sform(larger, 2)
    nib.save(image, tmp_path / "in.nii.gz")
    scan = read_nifti(tmp_path / "in.nii.gz")
    assert any("disagree" in note for note in scan.notes) == noted
    np.testing.assert_allclose(scan.affine, larger, atol=1e-5)  # the sform is used
    write_like(tmp_path / "out.nii.gz", scan.data, scan)
    back = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(back.get_qform(), affine, atol=1e-4)
    np.testing.assert_allclose(back.get_sform(), larger, atol=1e-5)
    assert (back.header["qform_code"], back.header["sform_code"]) == (1, 2)


@pytest.mark.parametrize(
    ("voxel", "shift", "noted"),
    [(1, 0, False), (2, 0, True), (1.005, 0, False), (1.02, 0, True), (1, 0.05, False), (1, 0.5, True)],
)
def test_a_far_origin_hides_no_disagreement(tmp_path, voxel, shift, noted):
    sform = np.diag([1.0, 1, 1, 1])
    sform[:3, 3] = (-126, -126, -72)
    qform = np.diag([voxel, voxel, voxel, 1.0])
    qform[:3, 3] = sform[:3, 3] + (shift, 0, 0)
    image = nib.Nifti1Image(integers().astype(np.float32), sform)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nib.save(image, tmp_path / "in.nii.gz")
    scan = read_nifti(tmp_path / "in.nii.gz")
    assert any("disagree" in note for note in scan.notes) == noted
    np.testing.assert_allclose(scan.affine, sform, atol=1e-5)


@pytest.mark.parametrize("name", [f"{'x' * 300}.nii.gz", f"{'folder/' * 1000}in.nii", f"{'x' * 300}/in.nii.gz"])
def test_paths_too_long_to_be_looked_up(tmp_path, name):
    for look in (read_nifti, list_volumes, load_volumes, lambda path: refuse_early([path]), segment):
        with pytest.raises(InputError, match=r"cannot be reached \(File name too long\); shorten it") as error:
            look(Path(tmp_path / name) if look is read_nifti else str(tmp_path / name))
        assert len(str(error.value)) < 300


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_a_folder_that_may_not_be_searched(tmp_path, make_nifti):
    path = make_nifti(tmp_path / "closed" / "in.nii", integers().astype(np.float32))
    path.parent.chmod(0)
    root = os.geteuid() == 0
    if root:  # root can search every folder
        os.seteuid(65534)
    try:
        for look in (read_nifti, list_volumes, load_volumes, lambda p: refuse_early([p]), segment):
            with pytest.raises(InputError, match=r"cannot be reached \(Permission denied\); check its folders'"):
                look(path if look is read_nifti else str(path))
    finally:
        if root:
            os.seteuid(0)
        path.parent.chmod(0o755)


AFFINE_DAMAGE = {
    "zero": (280, "<12f", *[0.0] * 12),
    "nan": (280, "<12f", float("nan"), 1, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0),
    "flat": (280, "<12f", 2, 0, 0, 0, 0, 2, 0, 0, 2, 2, 0, 0),
    "quaternion": (252, "<hh6f", 1, 0, 5, 5, 5, 0, 0, 0),
}


@pytest.mark.parametrize("damage", AFFINE_DAMAGE)
def test_unusable_affine_is_refused_or_ignored(tmp_path, make_nifti, damage):
    path = patched(make_nifti, tmp_path, *AFFINE_DAMAGE[damage])
    with pytest.raises(InputError, match=r"patched\.nii\.gz.*--ignore-affine"):
        read_nifti(path)
    scan = read_nifti(path, ignore_affine=True)
    np.testing.assert_array_equal(scan.data, integers())  # axes as stored
    np.testing.assert_allclose(scan.spacing_mm, (2, 2, 3))
    assert any("ignored" in note for note in scan.notes)
    labels = (scan.data % 3).astype(np.uint8)
    write_like(tmp_path / "out.nii", labels, scan, labels=True)
    raw, out = gzip.decompress(path.read_bytes()), (tmp_path / "out.nii").read_bytes()
    assert out[252:328] == raw[252:328]  # codes, quaternion and rows, bit for bit
    assert out[352:] == labels.tobytes(order="F")


# invalid files


def test_time_series_needs_a_choice(tmp_path, make_nifti):
    volumes = np.stack([integers(), integers()[::-1], integers() + 7], axis=-1).astype(np.float32)
    path = make_nifti(tmp_path / "four.nii.gz", volumes)
    with pytest.raises(InputError, match=r"four\.nii\.gz.*3 volumes.*--volume N"):
        read_nifti(path)
    for index in range(3):
        np.testing.assert_array_equal(read_nifti(path, volume=index).data, volumes[..., index])
    for index in (3, -1):
        with pytest.raises(InputError, match=r"four\.nii\.gz.*3 volume"):
            read_nifti(path, volume=index)


def test_single_volume_of_more_axes_is_squeezed(tmp_path, make_nifti):
    for extra in (1, 2):
        array = integers().reshape(*SHAPE, *[1] * extra).astype(np.float32)
        scan = read_nifti(make_nifti(tmp_path / f"{extra}.nii.gz", array))
        np.testing.assert_array_equal(scan.data, integers())
        assert any("volume 0 of 1" in note for note in scan.notes)
        write_like(tmp_path / "out.nii.gz", (scan.data % 2).astype(np.uint8), scan, labels=True)
        assert nib.load(tmp_path / "out.nii.gz").shape == SHAPE


def test_five_axes_are_numbered_as_stored(tmp_path, make_nifti):
    array = integers((3, 4, 5, 2, 3)).astype(np.float32)
    path = make_nifti(tmp_path / "five.nii.gz", array)
    with pytest.raises(InputError, match=r"6 volumes.*--volume N"):
        read_nifti(path)
    np.testing.assert_array_equal(read_nifti(path, volume=3).data, array[..., 1, 1])


@pytest.mark.parametrize(("value", "count"), [(np.nan, 1), (np.inf, 3), (-np.inf, 2)])
def test_not_finite_voxels(tmp_path, make_nifti, value, count):
    array = integers().astype(np.float32)
    array.flat[10 : 10 + count] = value
    path = make_nifti(tmp_path / "bad.nii.gz", array)
    with pytest.raises(InputError, match=rf"bad\.nii\.gz: {count} of 210 voxels are NaN or Inf.*--nan-to-zero"):
        read_nifti(path)
    scan = read_nifti(path, nan_to_zero=True)
    np.testing.assert_array_equal(scan.data, np.where(np.isfinite(array), array, 0))
    assert any(f"{count} NaN or Inf" in note for note in scan.notes)


def test_all_nan_stays_refused(tmp_path, make_nifti):
    path = make_nifti(tmp_path / "bad.nii.gz", np.full(SHAPE, np.nan, np.float32))
    with pytest.raises(InputError, match=r"bad\.nii\.gz.*no contrast"):
        read_nifti(path, nan_to_zero=True)


REFUSED_ARRAYS = {
    "constant": (np.full(SHAPE, 7.0, np.float32), "no contrast.*give a scan"),
    "zeros": (np.zeros(SHAPE, np.int16), "no contrast.*give a scan"),
    "two axes": (integers((5, 6)).astype(np.float32), "not a 3D volume.*give a scan"),
    "one slice": (integers((5, 6, 1)).astype(np.float32), "not a 3D volume.*give a scan"),
    "complex": (integers().astype(np.complex64), "complex.*convert"),
    "colours": (np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB.*convert"),
}


@pytest.mark.parametrize("name", REFUSED_ARRAYS)
def test_arrays_that_are_no_scan(tmp_path, make_nifti, name):
    array, message = REFUSED_ARRAYS[name]
    path = make_nifti(tmp_path / "bad.nii.gz", array)
    with pytest.raises(InputError, match=rf"bad\.nii\.gz.*{message}"):
        read_nifti(path)


HEADER_DAMAGE = {
    "negative dimension": ((40, "<8h", 3, -5, 6, 7, 1, 1, 1, 1), "shape|damaged"),
    "empty axis": ((40, "<8h", 3, 0, 6, 7, 1, 1, 1, 1), "invalid shape"),
    "dim[0] zero": ((40, "<h", 0), "invalid shape|damaged"),
    "dim[0] nine": ((40, "<h", 9), "shape|damaged"),
    "unknown type": ((70, "<h", 999), "damaged"),
    "magic": ((344, "<4s", b"XXXX"), "magic|damaged"),
    "pair magic": ((344, "<4s", b"ni1\0"), "convert it to .nii"),
    "offset far off": ((108, "<f", 1e9), "invalid data offset"),
    "offset beyond the file": ((108, "<f", 1e8), "truncated"),
    "offset in the header": ((108, "<f", 100.0), "data at byte|damaged"),
    "offset NaN": ((108, "<f", float("nan")), "invalid data offset"),
    "size field": ((0, "<i", 1234), "no NIfTI header"),
}


@pytest.mark.parametrize("name", HEADER_DAMAGE)
def test_damaged_headers(tmp_path, make_nifti, name):
    change, message = HEADER_DAMAGE[name]
    with pytest.raises(InputError, match=rf"patched\.nii\.gz.*({message})") as caught:
        read_nifti(patched(make_nifti, tmp_path, *change))
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("copy", "convert"))


@pytest.mark.parametrize("name", ["huge.nii.gz", "huge.nii"])
def test_huge_dimensions_are_answered_from_the_header(tmp_path, make_nifti, name):
    raw = float_bytes(make_nifti, tmp_path)
    struct.pack_into("<4h", raw, 40, 3, 32767, 32767, 32767)
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(raw)) if name.endswith("gz") else raw)
    tracemalloc.start()
    clock = time.perf_counter()
    with pytest.raises((InputError, MemoryLimitError), match=name):
        read_nifti(path)
    assert time.perf_counter() - clock < 1
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_more_than_free_memory_is_refused(tmp_path, make_nifti, monkeypatch):
    import psutil

    path = make_nifti(tmp_path / "large.nii.gz", integers().astype(np.float32))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    with pytest.raises(MemoryLimitError, match=r"large\.nii\.gz.*resample"):
        read_nifti(path)


def file_damage(raw: bytes) -> dict[str, tuple[bytes, str]]:
    whole = gzip.compress(raw, mtime=0)
    crc = bytearray(whole)
    crc[-6] ^= 0xFF
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    return {
        "empty.nii.gz": (b"", "empty.*copy it again"),
        "empty.nii": (b"", "empty.*copy it again"),
        "nothing-inside.nii.gz": (gzip.compress(b""), "no NIfTI header|truncated"),
        "header-only.nii.gz": (gzip.compress(raw[:352]), "truncated.*copy it again"),
        "header-only.nii": (raw[:352], "truncated.*copy it again"),
        "half-header.nii": (raw[:200], "truncated inside its header.*copy it again"),
        "short.nii.gz": (gzip.compress(raw[:700]), "truncated, 348 of 840.*copy it again"),
        "short.nii": (raw[:700], "truncated.*copy it again"),
        "cut.nii.gz": (whole[: len(whole) // 2], "copy it again"),
        "cut-checksum.nii.gz": (whole[:-4], "copy it again"),
        "checksum.nii.gz": (bytes(crc), "damaged.*copy it again"),
        "flipped.nii.gz": (bytes(flipped), "copy it again"),
        "plain.nii.gz": (raw, "not gzip-compressed.*rename"),
        "zipped.nii": (whole, r"gzip-compressed but not named \.gz.*rename"),
        "page.nii.gz": (b"<html>404 Not Found</html>", "web page.*download"),
        "page.nii": (b"<html>404 Not Found</html>", "no NIfTI header"),
        "pointer.nii.gz": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "git lfs pull"),
        "random.nii.gz": (np.random.default_rng(0).bytes(5000), "not gzip-compressed"),
        "random.nii": (np.random.default_rng(0).bytes(5000), "no NIfTI header"),
    }


@pytest.mark.parametrize("name", file_damage(bytes(400)))
def test_damaged_files(tmp_path, make_nifti, name):
    content, message = file_damage(bytes(float_bytes(make_nifti, tmp_path)))[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*({message})") as caught:
        read_nifti(path)
    assert "\n" not in str(caught.value)


def test_garbage_after_a_whole_compressed_stream_is_noted(tmp_path, make_nifti):
    """The checksum has been verified by then; gzip and nibabel ignore trailing bytes too."""
    whole = gzip.compress(bytes(float_bytes(make_nifti, tmp_path)))
    for tail in (b"garbage after the end", b"<html>", bytes(100) + b"x"):
        (tmp_path / "a.nii.gz").write_bytes(whole + tail)
        scan = read_nifti(tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(scan.data, integers())
        assert any("after the end" in note for note in scan.notes)
    damaged = bytearray(whole)
    damaged[-6] ^= 0xFF  # the checksum; garbage must not hide it
    (tmp_path / "b.nii.gz").write_bytes(bytes(damaged) + b"garbage")
    with pytest.raises(InputError, match=r"damaged.*copy it again"):
        read_nifti(tmp_path / "b.nii.gz")


def test_bytes_after_the_data_are_left_alone(tmp_path, make_nifti):
    raw = bytes(float_bytes(make_nifti, tmp_path)) + b"more"
    for name, content in {
        "a.nii": raw,
        "a.nii.gz": gzip.compress(raw),
        "b.nii.gz": gzip.compress(raw) + bytes(512),
    }.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_nifti(tmp_path / name).data, integers())


def test_paths_that_are_no_nifti_file(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.nii\.gz: no such file"):
        read_nifti(tmp_path / "nowhere.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises(InputError, match=r"folder\.nii\.gz: is a folder; give a \.nii"):
        read_nifti(tmp_path / "folder.nii.gz")
    (tmp_path / "scan.txt").write_text("x")
    with pytest.raises(InputError, match=r"scan\.txt.*must end in \.nii"):
        read_nifti(tmp_path / "scan.txt")


# arrays and images


def test_as_volume_tensor(tmp_path, make_nifti):
    array = integers().astype(np.float32)
    path = make_nifti(tmp_path / "las.nii.gz", array, np.diag([-2.0, 2.0, 3.0, 1.0]))
    canonical = torch.from_numpy(array[::-1].copy())[None, None]
    for source in (path, str(path), nib.load(path), read_nifti(path)):
        assert torch.equal(as_volume_tensor(source), canonical)
    plain = torch.from_numpy(array)
    reversed_strides = array[::-1].copy()[::-1]
    for source in (
        array,
        array.astype(">f4"),
        np.asfortranarray(array),
        reversed_strides,
        plain,
        plain.double(),
        plain[None],
        plain[None, None],
    ):
        assert torch.equal(as_volume_tensor(source), plain[None, None])
    assert as_volume_tensor(plain.expand(4, 1, *SHAPE)).shape == (4, 1, *SHAPE)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 5, 6, 7), (0, 6, 7)])
def test_as_volume_tensor_refuses_other_shapes(shape):
    with pytest.raises(InputError, match=r"must be \(H, W, D\)"):
        as_volume_tensor(np.zeros(shape, np.float32))


def test_as_volume_tensor_refuses_complex_and_series():
    array = np.ones(SHAPE, np.complex64)
    for source in (array, torch.from_numpy(array), nib.Nifti1Image(array, np.eye(4))):
        with pytest.raises(InputError, match="magnitude"):
            as_volume_tensor(source)
    with pytest.raises(InputError, match="slicer"):
        as_volume_tensor(nib.Nifti1Image(np.zeros((*SHAPE, 2), np.float32), np.eye(4)))

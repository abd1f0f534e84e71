"""Uploads: names, archives, limits, references to other files, and their removal."""

import zipfile

import numpy as np
import pytest

from diffdiscover3d.app.jobs import plain_message
from diffdiscover3d.app.sessions import JobStoppedError, Sessions
from diffdiscover3d.app.uploads import arrange_uploads, safe_name
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.errors import InputError

LIMIT = 2**20
VALUES = np.random.default_rng(5).normal(size=(9, 7, 8)).astype(np.float32)


def write(folder, name: str, content: bytes):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(content)
    return path


def metaimage(data_file: str) -> bytes:
    return (
        "ObjectType = Image\nNDims = 3\nDimSize = 9 7 8\nElementType = MET_FLOAT\nElementSpacing = 1 2 3\n"
        f"ElementByteOrderMSB = False\nElementDataFile = {data_file}\n"
    ).encode()


def test_a_header_and_its_data_are_one_volume(tmp_path):
    pytest.importorskip("SimpleITK")
    # each upload has a folder of its own
    header = write(tmp_path / "one", "scan.mhd", metaimage("scan.raw"))
    data = write(tmp_path / "two", "scan.raw", VALUES.tobytes(order="F"))
    volume = arrange_uploads([data, header], tmp_path / "job", LIMIT)
    assert volume.name == "scan.mhd"
    # LPS to RAS turns the first two axes
    np.testing.assert_array_equal(read_volume(volume).data, VALUES[::-1, ::-1])


def test_an_archive_of_a_zarr_store(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.save_array(str(tmp_path / "cells.zarr"), VALUES.T)
    with zipfile.ZipFile(tmp_path / "cells.zip", "w") as archive:
        for path in (tmp_path / "cells.zarr").rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    volume = arrange_uploads([tmp_path / "cells.zip"], tmp_path / "job", LIMIT)
    assert volume.name == "cells.zarr"
    np.testing.assert_array_equal(read_volume(volume).data, read_volume(tmp_path / "cells.zarr").data)


def test_one_of_several_arrays(tmp_path):
    np.savez(tmp_path / "two.npz", a=VALUES, b=VALUES + 1)
    volume = arrange_uploads([tmp_path / "two.npz"], tmp_path / "job", LIMIT, "b")
    assert read_volume(volume).data.mean() == pytest.approx(1 + VALUES.mean(), abs=1e-5)
    with pytest.raises(InputError, match="no name of an array"):
        arrange_uploads([tmp_path / "two.npz"], tmp_path / "again", LIMIT, "b@volume=1")


def test_what_is_refused(tmp_path, make_nifti):
    scan = make_nifti(tmp_path / "scan.nii.gz", VALUES)
    other = make_nifti(tmp_path / "deeper" / "scan.nii.gz", VALUES)
    third = make_nifti(tmp_path / "other.nii.gz", VALUES)
    text = write(tmp_path, "list.txt", f"{scan}\n".encode())
    zeros = tmp_path / "zeros.zip"
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.nii", bytes(9 * LIMIT))
    outside = tmp_path / "outside.zip"
    with zipfile.ZipFile(outside, "w") as archive:
        archive.writestr("../../scan.nii", b"x")
    for number, (files, message) in enumerate(
        (
            ([], "no volume yet"),
            ([scan, other], "several uploads have this name"),
            ([scan, third], "2 volumes"),
            # a list of paths would be one of files of this machine
            ([text], "no volume of a known format"),
            ([write(tmp_path, "large.nii", bytes(LIMIT + 1))], "limit of this app is 1 MB"),
            ([zeros], "9 MB once unpacked; the limit is 8 MB"),
            ([outside], "holds a file with the path"),
            ([write(tmp_path, "damaged.zip", b"PK\3\4" + bytes(80))], "no zip archive or a damaged one"),
        )
    ):
        with pytest.raises(InputError, match=message):
            arrange_uploads(files, tmp_path / f"job{number}", LIMIT)
    assert not (tmp_path / "scan.nii").exists()


@pytest.mark.parametrize("reference", ["/etc/passwd", "../secret.raw", "a/../../secret.raw", "LIST\n/etc/passwd"])
def test_headers_that_refer_to_other_files_are_refused(tmp_path, reference):
    nrrd = f"NRRD0004\ntype: float\ndimension: 3\nsizes: 9 7 8\nencoding: raw\ndata file: {reference}\n".encode()
    for name, content in (("scan.mhd", metaimage(reference)), ("scan.nhdr", nrrd), ("scan.nrrd", nrrd)):
        with pytest.raises(InputError, match=r"another file by a path|several data files"):
            arrange_uploads([write(tmp_path / "up", name, content)], tmp_path / name, LIMIT)


def test_a_reference_behind_a_long_header_is_refused(tmp_path):
    padded = metaimage("/etc/passwd").replace(b"NDims", b"Comment = x\n" * 100_000 + b"NDims")
    with pytest.raises(InputError, match="header of more than"):
        arrange_uploads([write(tmp_path / "up", "scan.mhd", padded)], tmp_path / "job", 2 * LIMIT)


def test_hdf5_with_data_elsewhere_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["volume"] = VALUES
    raw = write(tmp_path, "secret.raw", VALUES.tobytes())

    def link(file):
        file.create_group("deep")["volume"] = h5py.ExternalLink(str(secret), "/volume")

    def external(file):
        file.create_dataset("volume", VALUES.shape, "f4", external=[(str(raw), 0, VALUES.nbytes)])

    def virtual(file):
        layout = h5py.VirtualLayout(VALUES.shape, "f4")
        layout[:] = h5py.VirtualSource(str(secret), "volume", VALUES.shape)
        file.create_virtual_dataset("volume", layout)

    for make in (link, external, virtual):
        path = tmp_path / f"{make.__name__}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        inner = "/deep/volume" if make is link else "/volume"
        shown = read_volume(f"{path}::{inner}").data  # elsewhere the other file may be meant
        np.testing.assert_array_equal(shown, read_volume(secret).data)
        with pytest.raises(InputError, match="takes data from another file"):
            arrange_uploads([path], tmp_path / make.__name__, LIMIT, inner)
    assert arrange_uploads([secret], tmp_path / "plain", LIMIT).name == "secret.h5"


def test_ome_tiff_with_planes_elsewhere_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "cells.ome.tif"
    tifffile.imwrite(path, VALUES, metadata={"axes": "ZYX"})
    assert arrange_uploads([path], tmp_path / "plain", LIMIT).name == "cells.ome.tif"
    with tifffile.TiffFile(path) as file:
        metadata = file.ome_metadata
    uuid = '<UUID FileName="/data/other.ome.tif">urn:uuid:1</UUID></TiffData>'
    changed = metadata.replace("/></Pixels>", f">{uuid}</Pixels>")
    assert changed != metadata
    tifffile.imwrite(path, VALUES, description=changed, metadata=None)
    with pytest.raises(InputError, match=r"'/data/other\.ome\.tif'"):
        arrange_uploads([path], tmp_path / "job", LIMIT)


def test_names_are_kept_where_they_mean_nothing():
    assert safe_name("Patient 3 (T1), été.nii.gz") == "Patient 3 (T1), été.nii.gz"
    assert safe_name("a::b@volume=1*[x]?.h5") == "a__b@volume=1__x__.h5"
    assert safe_name("..\\..\\scan.nii") == "scan.nii" and safe_name("../..") == "upload"


def test_messages_have_no_folders(tmp_path):
    root = tmp_path
    error = InputError(f"{root}/results/job-a1/upload/scan.nii: is bad,\nunlike {root}/results/job-a1/upload/x/y.dcm.")
    assert plain_message(error, root) == "scan.nii: is bad, unlike x/y.dcm."
    assert plain_message(InputError(f"{root}/0a1b/scan.nii: is bad."), root) == "scan.nii: is bad."
    assert plain_message(MemoryError(), root).startswith("out of memory")


def test_uploads_and_results_go_with_their_session(tmp_path):
    sessions = Sessions(tmp_path)
    shared, own = write(tmp_path / "h1", "shared.nii", b"1"), write(tmp_path / "h2", "own.nii", b"2")
    sessions.hold("a", [shared, own])
    sessions.hold("b", [shared])
    with sessions.job("a") as first:
        (first / "parts.nii").write_bytes(b"3")
    assert (first / "parts.nii").exists()
    with sessions.job("a") as second:
        assert not first.exists()  # the results of the job before
    sessions.hold("a", [shared])
    assert not own.parent.exists()
    sessions.end("a")
    assert not second.exists() and shared.exists()
    sessions.end("b")
    assert not shared.exists() and {p.name for p in tmp_path.iterdir()} == {"results", "demos"}


def test_a_job_ends_with_its_session_or_when_it_is_stopped(tmp_path):
    sessions = Sessions(tmp_path)
    for end in (sessions.end, sessions.stop):
        sessions.start("a")
        with pytest.raises(JobStoppedError), sessions.job("a") as folder:
            sessions.check_wanted("a", folder)
            end("a")
            sessions.check_wanted("a", folder)
        assert not folder.exists()
    with pytest.raises(JobStoppedError), sessions.job("a"):
        pytest.fail("it was stopped while it waited")
    sessions.start("a")
    with sessions.job("a"):
        pass


def test_files_outside_the_folder_are_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    sessions = Sessions(root)
    secret = write(tmp_path, "secret.nii", b"1")
    (root / "link.nii").symlink_to(secret)
    with sessions.job("other") as folder:
        (folder / "parts.nii").write_bytes(b"2")
    for path in (secret, root / ".." / "secret.nii", root / "link.nii", folder / "parts.nii"):
        with pytest.raises(InputError, match="was not uploaded"):
            sessions.hold("a", [path])
    with pytest.raises(InputError, match="no longer there"):
        sessions.hold("a", [root / "h1" / "gone.nii"])
    assert secret.exists()

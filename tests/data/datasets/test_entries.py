"""Entries of folders and lists: links, special files, names of any bytes, endings in capitals, barred folders."""

import gzip
import os
import socket
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.datasets.folder import VolumeFolder
from diffdiscover3d.data.datasets.listing import list_volumes, look_into
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import display_name, stem, volume_sha256
from diffdiscover3d.errors import InputError
from diffdiscover3d.segmentation.finish import Finish
from tests.helpers.opened_scans import open_slabs

VALUES = np.random.default_rng(5).normal(size=(5, 6, 7)).astype(np.float32)
LATIN = os.fsdecode(b"caf\xe9.nii")


def write(path: Path, scale: float = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(VALUES * np.float32(scale), np.eye(4)), path)
    return path


def names(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in list_volumes(folder)]


def reasons(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): reason for p, reason in look_into(folder).left_out}


def test_endings_in_capitals(tmp_path):
    plain = write(tmp_path / "a.nii")
    (tmp_path / "B.NII").write_bytes(plain.read_bytes())
    for name in ("C.NII.GZ", "d.Nii.gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert names(tmp_path) == ["B.NII", "C.NII.GZ", "a.nii", "d.Nii.gz"]
    assert [stem(p) for p in list_volumes(tmp_path)] == ["B", "C", "a", "d"]
    for path in list_volumes(tmp_path):
        np.testing.assert_array_equal(read_volume(path).data, VALUES)
        with open_slabs(path, tmp_path) as scan:
            np.testing.assert_array_equal(scan.read(tuple(slice(0, n) for n in VALUES.shape)), VALUES)
    (tmp_path / "E.NII.GZ").write_bytes(plain.read_bytes())
    with pytest.raises(InputError, match=r"named \.gz but not gzip-compressed"):
        read_volume(tmp_path / "E.NII.GZ")


def test_links_to_folders_are_followed_once(tmp_path):
    scans, elsewhere = tmp_path / "bids", tmp_path / "elsewhere"
    write(scans / "sub-01" / "T1w.nii")
    write(elsewhere / "deep" / "T1w.nii", 2)
    (scans / "sub-02").symlink_to("../elsewhere")
    (scans / "again").symlink_to("sub-01")  # a second name of a folder that is there
    (scans / "sub-01" / "up").symlink_to("../..")  # a circle
    assert names(scans) == ["sub-01/T1w.nii", "sub-02/deep/T1w.nii"]


def test_names_of_links_count(tmp_path):
    store = write(tmp_path / "store" / "0123abcd.nii").rename(tmp_path / "store" / "0123abcd")  # without an ending
    annex = write(tmp_path / ".git" / "annex" / "MD5E-s9--77.nii")
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "sub-01.nii").symlink_to("../store/0123abcd")
    (scans / "sub-02.nii").symlink_to("../.git/annex/MD5E-s9--77.nii")
    assert names(scans) == ["sub-01.nii", "sub-02.nii"]
    for path, content in zip(list_volumes(scans), (store, annex), strict=True):
        assert display_name(path) == path.name and volume_sha256(path) == volume_sha256(content)
        np.testing.assert_array_equal(read_volume(path).data, VALUES)


def test_dangling_links_are_named(tmp_path):
    write(tmp_path / "a.nii")
    (tmp_path / "b.nii").symlink_to("nowhere.nii")
    (tmp_path / "sub-03").symlink_to("nowhere")
    assert names(tmp_path) == ["a.nii", "b.nii"]
    assert reasons(tmp_path) == {"sub-03": "a link to a file that is not there"}
    with pytest.raises(InputError, match=r"b\.nii: a link to a file that is not there; fetch the content"):
        read_volume(tmp_path / "b.nii")
    (tmp_path / "c.mgz").symlink_to("nowhere.mgz")
    with pytest.raises(InputError, match=r"c\.mgz: a link to a file that is not there"):
        read_volume(tmp_path / "c.mgz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_special_files_are_refused_at_once(tmp_path):
    write(tmp_path / "a.nii")
    os.mkfifo(tmp_path / "b.nii.gz")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        server.bind("c.nii")
        os.chdir(before)
    assert names(tmp_path) == ["a.nii"]
    assert reasons(tmp_path) == {"b.nii.gz": "a named pipe", "c.nii": "a socket", "pipe": "a named pipe"}
    for path, kind in (("b.nii.gz", "a named pipe"), ("c.nii", "a socket"), ("/dev/null", "a device")):
        for use in (read_volume, list_volumes, lambda p: Finish(mask=p).recorded()):
            with pytest.raises(InputError, match=f"is {kind}, not a file"):
                use(tmp_path / path)
    text = tmp_path / "list.txt"
    text.write_text("b.nii.gz\n")
    with pytest.raises(InputError, match="is a named pipe"):
        VolumeFolder(text)[0]


def as_other_user(function) -> str:
    """The text that a function returns in a forked child, which runs as another user if this one is root."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:  # permissions do not bind root
                os.setgid(54321)
                os.setuid(54321)
            os.write(writing, function().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    return text


def test_a_folder_without_access_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write(folder / "a.nii")
        barred = {"closed": 0o000, "listed": 0o444}
        for place, mode in barred.items():
            write(folder / place / "b.nii")
            (folder / place).chmod(mode)

        def look() -> str:
            found = look_into(folder)
            return repr((names(folder), sorted((p.name, reason) for p, reason in found.left_out)))

        seen = as_other_user(look)
        for place in barred:
            (folder / place).chmod(0o755)
    reason = "a folder that cannot be searched (Permission denied)"
    assert seen == repr((["a.nii"], [("closed", reason), ("listed", reason)]))


LISTS = {
    "byte order mark": (b"\xef\xbb\xbfa.nii\r\n", ["a.nii"]),
    "UTF-16": ("a.nii\r\nscan #2.nii\r\n".encode("utf-16"), ["a.nii", "scan #2.nii"]),
    "comments": (b"# all\na.nii # first\n\n  scan #2.nii  \n#a.nii\n", ["a.nii", "scan #2.nii"]),
    "blanks that belong to the name": (b" b .nii\n", [" b .nii"]),
    "Latin-1 for a UTF-8 name": ("été.nii\n".encode("latin-1"), ["été.nii"]),
    "UTF-8": ("été.nii\n".encode(), ["été.nii"]),
    "bytes as on the disk": (b"caf\xe9.nii\n", [LATIN]),
    "old Mac": (b"a.nii\rscan #2.nii\r", ["a.nii", "scan #2.nii"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(tmp_path, kind):
    for name in ("a.nii", "scan #2.nii", " b .nii", "été.nii", LATIN):
        write(tmp_path / "plain.nii").rename(tmp_path / name)
    content, expected = LISTS[kind]
    (tmp_path / "list.txt").write_bytes(content)
    assert [p.name for p in list_volumes(tmp_path / "list.txt")] == expected


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"a.nii\x00b.nii\n", b"\xff\xfea"])
def test_what_is_no_list(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match="neither a volume nor a list"):
        list_volumes(tmp_path / "list.txt")


def test_a_list_with_a_missing_file_names_it(tmp_path):
    (tmp_path / "list.txt").write_text("gone #1.nii\n")
    with pytest.raises(InputError, match=r"lists 1 file\(s\) that do not exist, first .*gone"):
        list_volumes(tmp_path / "list.txt")


def test_a_name_that_is_not_utf8(tmp_path):
    write(tmp_path / LATIN)
    write(tmp_path / "b.nii", 2)
    assert names(tmp_path) == ["b.nii", LATIN]
    assert display_name(tmp_path / LATIN) == r"caf\udce9.nii"
    assert len(VolumeFolder(tmp_path).fingerprint()) == 64

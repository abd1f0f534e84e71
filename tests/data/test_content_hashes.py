"""Hashes of files from the cache, and anew where a file has changed."""

import hashlib
import os

import numpy as np
import pytest

from diffdiscover3d.data import content_hashes as module
from diffdiscover3d.data.content_hashes import content_hashes
from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.errors import InputError
from tests.helpers.brats_folders import make_brats


def expected(paths) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"{number}.bin" for number in range(4)]
    for path in found:
        path.write_bytes(os.urandom(20_000))
    return found


def change_the_middle(path) -> None:
    """Same size, same ends, same modification time."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_only_changed_files_are_read_again(paths, tmp_path, monkeypatch):
    read = []
    real = module.sha256
    monkeypatch.setattr(module, "sha256", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr(module, "_COARSEST_NS", 0)  # as if the files were old
    cache = tmp_path / "cache"
    assert content_hashes([*paths, paths[0]], cache) == expected([*paths, paths[0]])
    assert read == ["0.bin", "1.bin", "2.bin", "3.bin"]
    assert content_hashes(paths[::-1], cache) == expected(paths[::-1]) and len(read) == 4
    change_the_middle(paths[2])
    assert content_hashes(paths, cache) == expected(paths) and read[4:] == ["2.bin"]
    (store,) = cache.iterdir()
    store.write_text("[[[")
    assert content_hashes(paths, cache) == expected(paths) and len(read) == 9
    paths[1].unlink()
    with pytest.raises(InputError, match=r"1\.bin: cannot be read"):
        content_hashes(paths, cache)


def test_a_recent_file_is_not_kept(paths, tmp_path):
    """Its times may stay equal when it changes again."""
    assert content_hashes(paths, tmp_path / "cache") == expected(paths)
    assert [p.read_text() for p in (tmp_path / "cache").glob("*.json")] in ([], ["{}\n"])


def test_a_change_in_the_middle_of_a_case(tmp_path):
    root = make_brats(tmp_path / "brats", "2020", 3)  # uncompressed or not, the middle of the file holds voxels
    options, cache = BraTSOptions(crop=(20, 20, 15)), tmp_path / "cache"
    before = BraTSVolumes(root, "all", options, cache)
    fingerprint, first = before.fingerprint(), before[0]["volume"].numpy().copy()
    path = before.cases[0].image("flair")
    write_other_intensities(path)
    after = BraTSVolumes(root, "all", options, cache)
    assert after.fingerprint() != fingerprint and not np.array_equal(after[0]["volume"].numpy(), first)
    path = before.cases[1].image("flair")
    write_other_intensities(path)
    with pytest.raises(InputError, match="has changed since it was listed"):
        before[1]


def write_other_intensities(path) -> None:
    import nibabel as nib

    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    values[10:14, 10:14, 8:11] += 37
    stamp = path.stat()
    nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

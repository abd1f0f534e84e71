"""Reading the bytes of a file: at most as many as its header declares, all of them hashed."""

import gzip
import hashlib
import struct
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.formats.nifti.payload import open_payload
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.errors import InputError
from tests.helpers.corpus import blobs
from tests.helpers.opened_scans import open_slabs


def bomb(start: bytes, mebibytes: int) -> bytes:
    """A gzip stream of `start` and zeros, about a thousandth of their length."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(start)]
    parts += [packer.compress(bytes(2**20)) for _ in range(mebibytes)]
    return b"".join([*parts, packer.flush()])


def test_a_bomb_is_read_as_far_as_its_header_says(tmp_path):
    values = blobs().astype(np.float32)
    (tmp_path / "a.nii.gz").write_bytes(bomb(nib.Nifti1Image(values, np.eye(4)).to_bytes(), 1500))
    assert (tmp_path / "a.nii.gz").stat().st_size < 2**21
    tracemalloc.start()
    scan = read_nifti(tmp_path / "a.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(scan.data, values)
    assert peak < 2**24


def test_a_bomb_before_the_data_is_refused_from_the_header(tmp_path):
    raw = bytearray(nib.Nifti1Image(blobs().astype(np.float32), np.eye(4)).to_bytes())
    struct.pack_into("<f", raw, 108, 2.0**30)
    (tmp_path / "a.nii.gz").write_bytes(bomb(bytes(raw), 1500))
    with pytest.raises(InputError, match=r"a\.nii\.gz.*data offset"):
        read_nifti(tmp_path / "a.nii.gz")


def test_members_and_chunks_are_one_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdiscover3d.data.formats.nifti.payload._CHUNK", 7)
    data = np.random.default_rng(0).bytes(1000)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"".join(gzip.compress(data[i : i + 130]) for i in range(0, 1000, 130)))
    assert read(path, 40, 960) == data[40:]
    assert read(path, 40, 100) == data[40:140]
    with pytest.raises(InputError, match="truncated, 960 of 961"):
        read(path, 40, 961)
    (tmp_path / "a.nii").write_bytes(data)
    assert read(tmp_path / "a.nii", 40, 960) == data[40:]


def read(path, offset: int, length: int) -> bytes:
    notes = []
    with open_payload(path) as payload:
        payload.peek(60)  # more than there is before the data
        found = payload.read(offset, length, notes).tobytes()
        assert notes == [] and payload.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_byte_of_the_file_is_hashed(tmp_path, make_nifti, suffix):
    """A file of two volumes, of which one is read, with further bytes after the data."""
    path = make_nifti(tmp_path / f"a{suffix}", np.stack([blobs(), blobs()], axis=-1).astype(np.int16))
    path.write_bytes(path.read_bytes() + b"behind" * 1000)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_nifti(path, volume=1).sha256 == expected
    with open_slabs(path, tmp_path, volume=0) as scan:
        assert scan.sha256 == expected
    values = nib.Nifti1Image(blobs().astype(np.float32), np.eye(4)).to_bytes()
    path.write_bytes(bomb(values, 100) if suffix == ".nii.gz" else values + bytes(100 * 2**20))
    assert read_nifti(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

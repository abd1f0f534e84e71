"""The sha256 of a volume is that of the bytes that were read; a file that changes meanwhile is noticed."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffdiscover3d.data.formats import stamps
from diffdiscover3d.data.formats.reading import open_source, read_source, read_volume, stream_source
from diffdiscover3d.data.formats.registry import volume_sha256
from diffdiscover3d.errors import InputError
from tests.helpers import volume_files as files
from tests.helpers.opened_scans import open_scan

for _module in ("SimpleITK", "pydicom", "h5py", "tifffile", "mrcfile", "zarr"):
    pytest.importorskip(_module)


def files_in(place: Path) -> list[Path]:
    return sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]


def place_of(path) -> Path:
    return Path(str(path).split("::")[0])


@pytest.fixture(params=files.KINDS)
def pair(request, tmp_path):
    """A volume, and the files of another one of the same shape."""
    paths = []
    for folder, values in (("one", files.phantom()), ("other", files.phantom()[::-1])):
        (tmp_path / folder).mkdir()
        paths.append(files.write_as(tmp_path / folder, request.param, values))
    return paths[0], files_in(place_of(paths[1]))


def test_the_hash_of_what_was_read(pair, tmp_path):
    place = place_of(pair[0])
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files_in(place)]
    expected = digests[0] if place.is_file() else hashlib.sha256("".join(digests).encode()).hexdigest()
    assert read_volume(pair[0]).sha256 == volume_sha256(pair[0]) == expected
    with open_scan(pair[0], tmp_path) as scan:
        assert scan.sha256 == expected


def replace(target: Path, source: Path) -> None:
    shutil.copy(source, target.with_name("new"))
    os.replace(target.with_name("new"), target)


def overwrite(target: Path, source: Path) -> None:
    """In place, with the times of before."""
    before = target.stat()
    with open(target, "r+b") as file:
        file.write(source.read_bytes())
        file.truncate()
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("recent", [False, True])
@pytest.mark.parametrize("change", [replace, overwrite])
def test_a_change_while_it_is_read(pair, tmp_path, monkeypatch, change, recent):
    """A file is exchanged after the volume was opened; found by its content, or by its stamp alone if it is old."""
    monkeypatch.setattr(stamps, "_COARSEST_NS", 10**18 if recent else 0)
    path, others = pair
    both = zip(files_in(place_of(path)), others, strict=True)
    target, other = [(one, two) for one, two in both if one.read_bytes() != two.read_bytes()][-1]
    original = target.read_bytes()
    for read in (read_source, lambda source: stream_source(source, tmp_path).__enter__()):
        with pytest.raises(InputError, match="changed while it was being read"), open_source(path) as source:
            change(target, other)
            read(source)
        target.write_bytes(original)
    assert np.array_equal(np.sort(read_volume(path).data, axis=None), np.sort(files.phantom(), axis=None))


def test_a_chunk_that_appears_while_a_store_is_read(tmp_path):
    store = files.write_as(tmp_path, "zarr", files.phantom())
    chunk = [p for p in files_in(store) if p.suffix != ".json"][-1]
    kept = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(InputError, match="changed while"), open_source(store, missing_chunks=True) as source:
        chunk.write_bytes(kept)
        read_source(source)


def test_a_single_slice_stands_for_its_series(tmp_path):
    folder = files.write_as(tmp_path, "dicom", files.phantom())
    slice_file = files_in(folder)[3]
    assert read_volume(slice_file).shape == files.phantom().shape
    assert read_volume(slice_file).sha256 == read_volume(folder).sha256 == volume_sha256(slice_file)

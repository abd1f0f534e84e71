"""Estimates of memory against measured peaks, and refusals before memory is allocated."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.errors import MemoryLimitError
from diffdiscover3d.segmentation import memory, preflight
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.utils import memory as machine
from tests.helpers.corpus import blobs

MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json").read_text())["rows"]
NETWORK = {"window_size": 256, "channels": [8, 16], "num_parts": 4}


@pytest.mark.parametrize("row", MEASURED, ids=lambda r: "x".join(map(str, r["shape"])))
def test_the_estimate_is_near_the_measured_peak(row):
    estimate = memory.segmentation_bytes(row["shape"], {**NETWORK, "num_parts": row["parts"]}) / 2**30
    assert 0.85 * row["peak_gib"] <= estimate <= 1.25 * row["peak_gib"]


def test_large_volumes_cost_their_parts_and_not_their_activations():
    inside, beyond = (memory.segmentation_bytes((n, 256, 256), NETWORK) for n in (256, 1024))
    assert beyond - inside == pytest.approx((8 * 4 + 20) * 1024 * 256**2)
    assert memory.segmentation_bytes((30, 20, 10, 7), NETWORK) == memory.segmentation_bytes((30, 20, 10), NETWORK)


def test_a_container_has_less(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert machine.free_memory() > 2**20
    (tmp_path / "memory.max").write_text("9000\n")
    assert machine.free_memory() == 4000
    (tmp_path / "memory.max").write_text("4000\n")
    assert machine.free_memory() == 0


def promise(path: Path, shape, dtype=np.uint8) -> Path:
    """A sparse file of zeros, as long as its header declares."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with open(path, "wb") as file:
        file.write(header.binaryblock)
        file.truncate(352 + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return path


def test_a_volume_that_cannot_be_read_into_memory(tmp_path, monkeypatch):
    path = promise(tmp_path / "large.nii", (400, 300, 200))
    monkeypatch.setattr(machine, "free_memory", lambda: 400 * 300 * 200 * 8)
    with pytest.raises(MemoryLimitError, match=r"large\.nii.*\(400, 300, 200\) needs about 0\.2 GiB.*resample"):
        read_nifti(path)


def test_a_volume_that_can_be_read_but_not_segmented(tmp_path, monkeypatch, tiny_discovery):
    path = promise(tmp_path / "large.nii", (300, 256, 256))
    monkeypatch.setattr(machine, "free_memory", lambda: 2**30)
    monkeypatch.setattr("diffdiscover3d.segmentation.files.stream_source", None)  # must not be called
    with pytest.raises(MemoryLimitError, match=r"large\.nii.*needs about 3\.0 GiB and 1\.0 GiB"):
        segment(path, tmp_path / "out", model=str(tiny_discovery), device="cpu")
    monkeypatch.setattr(machine, "free_memory", lambda: 2**29)
    with pytest.raises(MemoryLimitError, match=r"0\.5 GiB and .*; without --fast .* slab by slab in about 3\.0 GiB"):
        segment(path, tmp_path / "out", model=str(tiny_discovery), device="cpu", fast=True)
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub(tmp_path, make_nifti, monkeypatch, tiny_discovery):
    """The repository is fetched first, so that the first volume is announced or refused as well."""
    paths = [make_nifti(tmp_path / f"{name}.nii.gz", blobs().astype(np.float32)) for name in "ab"]
    monkeypatch.setattr("diffdiscover3d.hub.resolve.fetch_snapshot", lambda *_, **__: tiny_discovery)
    monkeypatch.setattr(preflight, "LARGE", 1)
    lines = []
    segment(paths, tmp_path / "one", model="user/name", device="cpu", on_estimate=lines.append)
    assert [line.split(": 12 x")[0] for line in lines] == [str(p) for p in paths]
    monkeypatch.setattr(machine, "free_memory", lambda: 2**20)
    with pytest.raises(MemoryLimitError, match=r"a\.nii\.gz.*needs about 0\.1 GiB"):
        segment(paths, tmp_path / "two", model="user/name", device="cpu")
    assert not (tmp_path / "two").exists()


def test_large_volumes_are_announced(tmp_path, make_nifti, monkeypatch, tiny_discovery):
    path, lines = make_nifti(tmp_path / "a.nii.gz", blobs().astype(np.float32)), []
    segment(path, tmp_path / "one", model=str(tiny_discovery), on_estimate=lines.append)
    assert lines == []
    monkeypatch.setattr(preflight, "LARGE", 1)
    segment(path, tmp_path / "two", model=str(tiny_discovery), on_estimate=lines.append)
    (line,) = lines
    assert line.startswith(f"{path}: 12 x 14 x 10 voxels, about 0.1 GiB of memory needed of ")

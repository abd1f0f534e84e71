"""Scans segmented slab by slab: the same files as from memory, clean-up after errors, bounded memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.cli import app as cli
from diffdiscover3d.data.formats.nifti import raw_grid
from diffdiscover3d.data.formats.nifti.source import open_nifti
from diffdiscover3d.errors import InputError, MemoryLimitError, OutputError
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting import page
from diffdiscover3d.segmentation import files as module
from diffdiscover3d.segmentation import out_of_core
from diffdiscover3d.segmentation import scan as scan_module
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.preflight import MemoryPlan, plan_memory
from diffdiscover3d.utils.progress import ProgressBar

SHAPE = (26, 19, 40)
LPS, PIR = np.diag([-1.5, -2, 3, 1]), np.array([[0, 0, 3, 0], [-1.5, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 1.0]])
ALL = {"preview": True, "statistics": True, "tables": True, "probabilities": True, "report": True}


def scan_values(shape=SHAPE) -> np.ndarray:
    """Integers: a ramp with a bright block and noise, so that every level finds several parts."""
    rng = np.random.default_rng(0)
    values = np.linspace(0, 200, shape[0])[:, None, None] + rng.normal(0, 40, shape)
    values[4:15, 5:12, 8:30] += 400
    return np.round(values)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """Folder of an untrained nested network of 3 and 5 parts with windows of 16 voxels."""
    folder = tmp_path_factory.mktemp("models") / "sliding"
    options = {"channels": (4, 8), "strides": (2,), "norm": "instance", "window_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        coarse = StructureDiscoveryModel(num_parts=3, **options)
        StructureDiscoveryModel.from_parent(coarse, (1, 2, 2), **options).eval().save_pretrained(folder / "discovery")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def keep_in_memory(monkeypatch) -> None:
    monkeypatch.setattr(module, "plan_memory", lambda *_, **__: MemoryPlan(False, None))


def store(folder: Path, kind: str) -> tuple[Path, dict]:
    folder.mkdir()
    values, reading = scan_values(), {}
    if kind == "scaled":
        image = nib.Nifti1Image(values.astype(np.int16), LPS)
        image.header.set_slope_inter(0.5, -7)
        (folder / "s.nii.gz").unlink(missing_ok=True)
        nib.save(image, folder / "s.nii.gz")
    elif kind == "big-endian":
        header = nib.Nifti2Header(endianness=">")
        header.set_data_dtype(">i2")
        nib.save(nib.Nifti2Image(values.astype(">i2"), PIR, header), folder / "s.nii")
    elif kind == "series":
        values[3, 3, 3] = np.nan
        nib.save(nib.Nifti1Image(np.stack([values * 0, values], axis=-1).astype(np.float32), PIR), folder / "s.nii.gz")
        reading = {"volume": 1, "nan_to_zero": True}
    else:
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([2.0, 2, 3, 1])), folder / "s.nii")
    (path,) = folder.iterdir()
    return path, reading


def timeless(path: Path):
    """The contents of a file without time and memory, and without the hash of probabilities, which are rounded."""
    if path.suffix == ".json":
        contents = json.loads(path.read_text())
        if "outputs" in contents:
            contents["outputs"] = {k: v for k, v in contents["outputs"].items() if "probseg" not in k}
        return {k: v for k, v in contents.items() if k not in ("seconds", "peak_memory_mib", "windows")}
    if path.suffix == ".html":
        return re.sub(r"[\d.]+ s, at most [\d.]+ MiB", "", path.read_text(encoding="utf-8"))
    return path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "order"), [("plain", "model"), ("scaled", "size"), ("big-endian", "size"), ("series", "model")]
)
def test_every_file_is_what_it_is_from_memory(tmp_path, sliding, monkeypatch, kind, order):
    monkeypatch.setattr(raw_grid, "SLAB_VOXELS", 2000)
    path, reading = store(tmp_path / "in", kind)
    options = {**ALL, **reading, "level": "all", "order": order, "model": str(sliding)}
    (mine,) = segment(path, tmp_path / "slabs", **options)
    keep_in_memory(monkeypatch)
    (theirs,) = segment(path, tmp_path / "memory", **options)
    assert names(tmp_path / "slabs") == names(tmp_path / "memory") and len(names(tmp_path / "slabs")) == 15
    for level, one in mine.levels.items():
        soft, expected = (nib.load(r.levels[level].probabilities) for r in (mine, theirs))
        np.testing.assert_allclose(soft.get_fdata(), expected.get_fdata(), atol=2e-4)
        assert soft.header == expected.header
        assert len(np.unique(nib.load(one.labels).dataobj)) > level
    for name in names(tmp_path / "slabs"):
        if "probseg" not in name:
            assert timeless(tmp_path / "slabs" / name) == timeless(tmp_path / "memory" / name), name
    assert mine.fractions == theirs.fractions and mine.notes == theirs.notes
    for files in mine.levels.values():
        assert json.loads(files.sidecar.read_text())["windows"] == {"side": 16, "count": 2 * 2 * 3}


def test_labels_do_not_depend_on_how_the_scan_is_stored(tmp_path, sliding):
    values = nib.Nifti1Image(scan_values().astype(np.float32), np.diag([2.0, 2, 3, 1]))
    found = []
    for name, turn in (
        ("a", [[0, 1], [1, 1], [2, 1]]),
        ("b", [[2, -1], [0, 1], [1, -1]]),
        ("c", [[1, 1], [2, -1], [0, -1]]),
    ):
        nib.save(values.as_reoriented(np.array(turn)), tmp_path / f"{name}.nii.gz")
        (result,) = segment(tmp_path / f"{name}.nii.gz", tmp_path / "out", model=str(sliding), level=1)
        found.append(np.asarray(nib.as_closest_canonical(nib.load(result.labels)).dataobj))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_the_largest_part_of_a_voxel():
    sums = np.random.default_rng(0).integers(0, 4, (5, 9, 11)).astype(np.float32)  # with many ties
    np.testing.assert_array_equal(out_of_core.largest(sums, np.uint16), sums.argmax(axis=0))


def test_a_coarser_level_is_divided_once_and_alone_gives_the_same(tmp_path, sliding, monkeypatch):
    path, _ = store(tmp_path / "in", "plain")
    alone = {x: segment(path, tmp_path / str(x), model=str(sliding), level=x)[0] for x in (1, 2)}
    calls, real = [], out_of_core.stream_parts
    monkeypatch.setattr(
        out_of_core, "stream_parts", lambda n, *a, **k: (calls.append(n.config.num_parts), real(n, *a, **k))
    )
    (both,) = segment(path, tmp_path / "all", model=str(sliding), level="all")
    assert calls == [3, 5]
    for level, result in alone.items():
        assert both.levels[level].labels.read_bytes() == result.labels.read_bytes()


def test_large_scans_are_shown_smaller_on_their_page(tmp_path, sliding, monkeypatch):
    monkeypatch.setattr(page, "MAX_VOXELS", 12**3)
    path, _ = store(tmp_path / "in", "big-endian")
    texts = []
    for folder in ("slabs", "memory"):
        (result,) = segment(path, tmp_path / folder, model=str(sliding), report=True)
        texts.append(result.report.read_text(encoding="utf-8"))
        keep_in_memory(monkeypatch)
    data = [json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1)) for text in texts]
    assert data[0]["levels"] == data[1]["levels"]
    assert "to keep the page small" in texts[0]
    mine, theirs = (image_of(d["scan"]) for d in data)
    np.testing.assert_array_equal(mine.affine, theirs.affine)
    # box means instead of a Gaussian and interpolation: similar, not equal
    assert np.corrcoef(mine.get_fdata().ravel(), theirs.get_fdata().ravel())[0, 1] > 0.95


def image_of(item: dict) -> nib.Nifti1Image:
    import base64
    import gzip

    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(item["nifti"])))


def test_bad_voxels_are_refused_as_from_memory(tmp_path, sliding, monkeypatch):
    values = scan_values().astype(np.float32)
    values[1, 2, 3] = np.inf
    nib.save(nib.Nifti1Image(values, LPS), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"1 of 19,760 voxels are NaN or Inf; use --nan-to-zero") as mine:
        segment(tmp_path / "a.nii.gz", tmp_path / "out", model=str(sliding))
    keep_in_memory(monkeypatch)
    with pytest.raises(InputError) as theirs:
        segment(tmp_path / "a.nii.gz", tmp_path / "out", model=str(sliding))
    assert str(mine.value) == str(theirs.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "where", "error"),
    [
        ("plain", "window", KeyboardInterrupt()),
        ("scaled", "window", RuntimeError("bug")),
        ("scaled", "window", OSError(28, "full")),
        ("scaled", "sidecar", KeyboardInterrupt()),
        ("plain", "sidecar", OutputError("full")),
    ],
)
def test_nothing_is_left_behind(tmp_path, sliding, monkeypatch, kind, error, where):
    path, _ = store(tmp_path / "in", kind)
    segment(path, tmp_path / "out", model=str(sliding), level=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    seen, real = [], StructureDiscoveryModel.segment_window

    def fail(*arguments, **options):
        seen.append(names(tmp_path / "out"))
        if where == "window" and len(seen) < 7:
            return real(*arguments, **options)
        raise error

    if where == "window":
        monkeypatch.setattr(StructureDiscoveryModel, "segment_window", fail)
    else:
        monkeypatch.setattr(scan_module, "write_json", fail)
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        segment(path, tmp_path / "out", model=str(sliding), level=1, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert all(name in before or name.startswith(".diffdiscover3d.") for name in seen[0])
    with pytest.raises(expected):
        segment(path, tmp_path / "new" / "deep", model=str(sliding), level=1)
    assert not (tmp_path / "new").exists() and names(tmp_path / "in") == [path.name]


def test_a_window_that_does_not_fit(tmp_path, sliding, monkeypatch):
    path, _ = store(tmp_path / "in", "plain")

    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(StructureDiscoveryModel, "segment_window", fail)
    with pytest.raises(MemoryLimitError, match=r"s\.nii.*not even in windows of 16 voxels; resample"):
        segment(path, tmp_path / "out", model=str(sliding))


@pytest.mark.parametrize("finish", [{"smooth": 1.0}, {"min_size": 40}, {"mask": "mask.nii"}])
def test_what_needs_the_whole_scan_keeps_it_in_memory(tmp_path, sliding, finish, monkeypatch):
    path = tmp_path / "scan.nii"
    nib.save(nib.Nifti1Image(scan_values().astype(np.float32), np.diag([2.0, 1, 1.5, 1])), path)
    if "mask" in finish:
        values = np.zeros(SHAPE, np.uint8)
        values[3:15, 4:16, 5:36] = 1
        nib.save(nib.Nifti1Image(values, nib.load(path).affine), tmp_path / "mask.nii")
        finish = {"mask": tmp_path / "mask.nii"}
    plain, finished = (segment(path, tmp_path / name, model=str(sliding), level=1, **options)[0]
                       for name, options in (("plain", {}), ("finished", finish)))  # fmt: skip
    assert "windows" in json.loads(plain.sidecar.read_text())  # by slabs
    assert "windows" not in json.loads(finished.sidecar.read_text())
    before, after = (np.asarray(nib.load(r.labels).dataobj) for r in (plain, finished))
    assert (before != after).any()
    keep_in_memory(monkeypatch)
    (expected,) = segment(path, tmp_path / "expected", model=str(sliding), level=1, **finish)
    np.testing.assert_array_equal(after, np.asarray(nib.load(expected.labels).dataobj))


def test_resume(tmp_path, sliding):
    path, _ = store(tmp_path / "in", "scaled")
    segment(path, tmp_path / "out", model=str(sliding), level="all")
    skipped = []
    assert segment(path, tmp_path / "out", model=str(sliding), level="all", resume=True, on_skip=skipped.append) == []
    assert skipped == [path]


def test_progress_within_a_scan(tmp_path, sliding, monkeypatch):
    path, _ = store(tmp_path / "in", "plain")
    seen = []
    monkeypatch.setattr(ProgressBar, "within", lambda _, *figures: seen.append(figures))
    segment(path, tmp_path / "out", model=str(sliding), level=2)
    assert seen == [(i, 24, "window") for i in range(1, 25)]  # half of them for the coarser level


def test_which_scans_are_divided_by_slabs(tmp_path, make_nifti):
    network = {"window_size": 16, "channels": [4], "num_parts": 3}
    path = make_nifti(tmp_path / "a.nii", scan_values().astype(np.int16))
    fits = make_nifti(tmp_path / "b.nii", scan_values((16, 9, 12)).astype(np.int16))
    with open_nifti(path) as large, open_nifti(fits) as small:
        assert plan_memory(large, network, True) == MemoryPlan(True, None)
        assert plan_memory(small, network, True) == MemoryPlan(False, None)
        assert plan_memory(large, network, True, working=(20, 20, 20)).by_slabs  # in blocks, from the disk
        for options in ({"fast": True}, {"whole": True}, {"fast": True, "working": (20, 20, 20)}):
            assert not plan_memory(large, network, True, **options).by_slabs
        for changes in ({"scaling": "robust"}, {"scaling": "robust", "frame": [16, 16, 16]}):
            assert not plan_memory(large, network | changes, True).by_slabs


def test_a_compressed_file_that_grows_is_not_read_before(tmp_path, sliding, monkeypatch, capsys):
    """The command line reads only the header of a file that would be large in memory, however small it is on disk."""
    path, _ = store(tmp_path / "in", "scaled")
    monkeypatch.setattr("diffdiscover3d.segmentation.preflight._READ_INTO", 0)
    monkeypatch.setattr("diffdiscover3d.segmentation.preflight.read_source", None)
    monkeypatch.setattr("diffdiscover3d.segmentation.preflight.LARGE", 1)
    arguments = ["segment", path, "--model", sliding, "--output", tmp_path / "out", "--level", "1"]
    monkeypatch.setattr(sys, "argv", ["diffdiscover3d", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "of memory needed of" in (line := capsys.readouterr().err) and "in windows of 16 voxels" in line
    assert len(names(tmp_path / "out")) == 3


MEASURED = """
import sys
from diffdiscover3d.segmentation import driver, files
from diffdiscover3d.segmentation.preflight import MemoryPlan
if sys.argv[1] == "memory":
    files.plan_memory = lambda *_, **__: MemoryPlan(False, None)
extras = {"preview": True, "report": True, "statistics": True}
driver.segment(sys.argv[2], sys.argv[3], model=sys.argv[4], level="all", **extras)
"""


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """The same scan takes less than 1.1 GiB slab by slab, and more from memory."""
    options = {"channels": (2, 4), "strides": (2,), "norm": "instance", "window_size": 64}
    coarse = StructureDiscoveryModel(num_parts=4, **options)
    StructureDiscoveryModel.from_parent(coarse, (2, 2, 2, 2), **options).eval().save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 60, (200, 220, 240), dtype=np.int16)
    values[40:160, 60:180, 50:190] += 200
    nib.save(nib.Nifti1Image(values, LPS), tmp_path / "scan.nii.gz")
    peaks = {}
    for how in ("slabs", "memory"):
        command = [sys.executable, "-c", MEASURED, how, tmp_path / "scan.nii.gz", tmp_path / how, tmp_path / "model"]
        child = subprocess.Popen([str(c) for c in command])
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        peaks[how] = usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
    assert peaks["slabs"] < 1.1 < peaks["memory"], peaks


def test_a_scan_that_changes_meanwhile_is_refused(tmp_path, sliding, monkeypatch):
    """A voxel changes in place while windows are read; older results remain."""
    path, _ = store(tmp_path / "in", "plain")
    segment(path, tmp_path / "out", model=str(sliding), level=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    real = StructureDiscoveryModel.segment_window

    def change(*arguments, **options):
        with open(path, "r+b") as file:
            file.seek(-4, 2)
            file.write(b"\x07\x07\x07\x07")
        return real(*arguments, **options)

    monkeypatch.setattr(StructureDiscoveryModel, "segment_window", change)
    with pytest.raises(InputError, match=r"s\.nii: changed while it was being read"):
        segment(path, tmp_path / "out", model=str(sliding), level=1, overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before

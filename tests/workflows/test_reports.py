"""Reports of label maps that do not fit, or that were not written by this program."""

import json
import resource

import numpy as np
import pytest

from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.errors import InputError
from diffdiscover3d.reporting.index_page import write_index
from diffdiscover3d.reporting.label_maps import read_label_map
from diffdiscover3d.workflows.reports import find_label_maps, make_reports

SHAPE = (9, 12, 10)


@pytest.fixture
def scan(tmp_path, make_nifti):
    return make_nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(10, 2, SHAPE).astype(np.float32))


def write_map(make_nifti, path, values=(0, 1, 2), dtype=np.uint8, **sidecar):
    labels = np.resize(np.repeat(values, 40), SHAPE).astype(dtype)
    make_nifti(path, labels)
    if sidecar:
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))
    return path


def test_a_changed_scan_or_map_is_noted(scan, make_nifti):
    labels = write_map(make_nifti, scan.parent / "a_dseg.nii.gz")
    truth = {"input": {"name": "a.nii.gz", "sha256": read_nifti(scan).sha256}}
    truth["outputs"] = {labels.name: read_nifti(labels).sha256}
    sidecar, lines = scan.parent / "a_dseg.json", []
    sidecar.write_text(json.dumps(truth))
    make_reports(scan, on_note=lines.append)
    assert lines == []
    sidecar.write_text(json.dumps(truth | {"input": {"name": "a.nii.gz", "sha256": "0" * 64}}))
    (page,) = make_reports(scan, overwrite=True, on_note=lines.append)
    assert len(lines) == 1 and "made of another file" in lines[0] and "made of another file" in page.read_text()
    sidecar.write_text(json.dumps(truth | {"outputs": {labels.name: "0" * 64}}))
    (page,) = make_reports(scan, overwrite=True, on_note=lines.append)
    assert len(lines) == 2 and "has changed since" in lines[1] and lines[1].split("note: ")[1] in page.read_text()
    for damaged in ("[" * 100_000, "[1]", '{"model": 3}', '{"parts": {}}', '{"input": [], "outputs": 3}', "\0"):
        sidecar.write_text(damaged)
        lines.clear()
        assert make_reports(scan, overwrite=True, on_note=lines.append) == [page]
        (line,) = lines
        assert "a_dseg.json is damaged" in line and line.split("note: ")[1] in page.read_text()
    sidecar.unlink()
    make_reports(scan, overwrite=True, on_note=lines.append)
    assert len(lines) == 1  # no note on a missing sidecar


def test_the_map_of_another_scan_is_never_taken(scan, make_nifti):
    folder = scan.parent
    one = write_map(make_nifti, folder / "a_level-1_dseg.nii.gz", input={"name": "a_level-1.nii.gz"})
    with pytest.raises(InputError, match="no a_dseg"):
        find_label_maps(scan)
    own = write_map(make_nifti, folder / "a_dseg.nii.gz", input={"name": "a.nii.gz"})
    write_map(make_nifti, folder / "a_level-x_dseg.nii.gz")
    assert find_label_maps(scan) == [own]
    assert find_label_maps(folder / "a_level-1.nii.gz") == [one]
    own.unlink()
    one.with_name("a_level-1_dseg.json").write_text(json.dumps({"input": {"name": "a.nii.gz"}}))
    assert find_label_maps(scan) == [one]


def test_the_index_lists_the_shares_of_its_own_scan(tmp_path):
    for name, share in (("scan", 0.25), ("scan_2", 0.11)):
        parts = {"parts": [{"index": 0, "fraction": share}, {"index": 1, "fraction": 1 - share}]}
        (tmp_path / f"{name}_dseg.json").write_text(json.dumps(parts))
        (tmp_path / f"{name}_report.html").write_text("")
    (tmp_path / "scan_level-1_dseg.json").write_text("[" * 100_000)
    write_index(tmp_path / "index.html", [tmp_path / "scan_report.html"])
    page = (tmp_path / "index.html").read_text()
    assert "2 parts: 25 %, 75 %" in page and "11 %" not in page


@pytest.mark.parametrize(("values", "dtype"), [((0, 70_000), np.int32), ((0, -1), np.int16), ((0, 0.5), np.float32)])
def test_labels_that_are_no_part_numbers(scan, make_nifti, values, dtype):
    path = write_map(make_nifti, scan.parent / "a_dseg.nii.gz", values, dtype)
    with pytest.raises(InputError, match="integers from 0 to 65535"):
        read_label_map(path, read_nifti(scan))


def test_a_label_map_with_nan_is_named_without_an_option(scan, make_nifti):
    """--nan-to-zero is about the scan."""
    labels = np.zeros(SHAPE, np.float32)
    labels[1, 2, 3] = np.nan
    path = make_nifti(scan.parent / "a_dseg.nii.gz", labels)
    with pytest.raises(InputError, match=r"a_dseg\.nii\.gz: holds NaN or Inf voxels; give a label map\.$"):
        read_label_map(path, read_nifti(scan))


def test_a_label_of_60_000_takes_little_memory(scan, make_nifti):
    for level, values in ((1, (7, 60_000)), (2, (3, 59_999, 60_000))):
        write_map(make_nifti, scan.parent / f"a_level-{level}_dseg.nii.gz", values, np.uint16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (page,) = make_reports(scan)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024  # KiB
    text = page.read_text()
    assert "level 1, 2 parts" in text and "level 2, 3 parts" in text and "part 60000" in text

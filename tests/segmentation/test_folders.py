"""Scans of one name in several folders, and results among the scans."""

import json

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.data.datasets.listing import describe_left_out, expand_all, list_volumes, look_into
from diffdiscover3d.errors import InputError, OutputError
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.workflows.reports import make_reports

SHAPE = (12, 14, 10)


def values(seed: int) -> np.ndarray:
    data = np.random.default_rng(seed).normal(100, 10, SHAPE).astype(np.float32)
    data[seed : seed + 5, 3:9, 2:7] += 60
    return data


@pytest.fixture
def subjects(tmp_path, make_nifti):
    for number in (1, 2):
        make_nifti(tmp_path / "study" / f"sub-0{number}" / "anat" / "T1w.nii.gz", values(number))
    return tmp_path / "study"


def files(folder) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_results_keep_the_folders_of_scans_of_one_name(subjects, tmp_path, tiny_discovery):
    out, model = tmp_path / "out", str(tiny_discovery)
    results = segment(subjects, out, model=model)
    endings = ("json", "nii.gz", "tsv")
    assert files(out) == [f"sub-0{n}/anat/T1w_dseg.{ending}" for n in (1, 2) for ending in endings]
    for number, result in zip((1, 2), results, strict=True):
        scan = subjects / f"sub-0{number}" / "anat" / "T1w.nii.gz"
        (alone,) = segment(scan, tmp_path / f"alone{number}", model=model)
        both = [np.asarray(nib.load(r.labels).dataobj) for r in (alone, result)]
        assert np.array_equal(*both)
        assert files(tmp_path / f"alone{number}") == [f"T1w_dseg.{ending}" for ending in endings]
    skipped = []
    assert segment(f"{subjects}/*/anat/*.nii.gz", out, model=model, resume=True, on_skip=skipped.append) == []
    assert len(skipped) == 2
    with pytest.raises(OutputError, match="already exists"):
        segment(subjects, out, model=model)
    pages = make_reports(subjects, parts=out, output=tmp_path / "pages")
    listed = ["index.html", "sub-01/anat/T1w_report.html", "sub-02/anat/T1w_report.html"]
    assert files(tmp_path / "pages") == listed and len(pages) == 3
    index = (tmp_path / "pages" / "index.html").read_text()
    assert all(f'href="{page}"' in index for page in listed[1:]) and ">sub-02/anat/T1w<" in index


def test_distinct_names_share_a_folder(subjects, tmp_path, tiny_discovery, make_nifti):
    (subjects / "sub-02" / "anat" / "T1w.nii.gz").rename(subjects / "sub-02" / "anat" / "T2w.nii.gz")
    segment(subjects, tmp_path / "out", model=str(tiny_discovery))
    assert files(tmp_path / "out") == [f"T{n}w_dseg.{ending}" for n in (1, 2) for ending in ("json", "nii.gz", "tsv")]
    make_nifti(subjects / "sub-01" / "anat" / "T1w.nii", values(3))  # one folder, one name
    with pytest.raises(OutputError, match="would both write"):
        segment(subjects, tmp_path / "new", model=str(tiny_discovery))
    assert not (tmp_path / "new").exists()


def test_own_results_are_no_scans(tmp_path, tiny_discovery, make_nifti):
    folder, model = tmp_path / "scans", str(tiny_discovery)
    scan = make_nifti(folder / "a.nii.gz", values(1))
    segment(scan, beside_inputs=True, model=model, probabilities=True)  # beside the scan
    segment(scan, folder / "mine.nii.gz", model=model)  # known by its sidecar only
    make_nifti(folder / "a_stage1.nii.gz", values(2))
    make_nifti(folder / "a_mask.nii.gz", values(2))
    (folder / "a.json").write_text('{"EchoTime": 0.03, "Modality": "MR"}')  # a sidecar of BIDS
    own = {"a_dseg.nii.gz", "a_probseg.nii.gz", "a_stage1.nii.gz", "mine.nii.gz"}
    for source in (folder, f"{folder}/*.nii.gz"):
        assert list_volumes(source) == [scan]
        said = "\n".join(describe_left_out(look_into(source)))
        assert f"{len(own) - 1} more: a result of this program" in said and "a_mask.nii.gz: named like a mask" in said
    # as a shell passes a glob: masks that were named are taken, results are not
    found = expand_all([str(p) for p in sorted(folder.glob("*.nii.gz"))])
    assert [p.name for p in found.volumes] == ["a.nii.gz", "a_mask.nii.gz"]
    assert {p.name for p, _ in found.left_out} == own
    lines = []
    results = segment(sorted(folder.glob("a*.nii.gz")), tmp_path / "out", model=model, on_left_out=lines.append)
    assert len(results) == 2 and "a result of this program" in lines[0]
    # named alone or included, a result is taken
    assert expand_all([folder / "a_dseg.nii.gz"]).volumes == (folder / "a_dseg.nii.gz",)
    assert folder / "mine.nii.gz" in list_volumes(folder, include=["mine*"])
    with pytest.raises(InputError, match="a result of this program"):
        expand_all([folder / "a_dseg.nii.gz", folder / "mine.nii.gz"])


def test_a_scan_that_is_named_twice_is_taken_once(tmp_path, make_nifti, monkeypatch):
    a, b = (make_nifti(tmp_path / "scans" / name, values(1)) for name in ("a.nii", "b.nii"))
    other = make_nifti(tmp_path / "elsewhere" / "a.nii", values(2))
    (tmp_path / "elsewhere" / "below").mkdir()
    (tmp_path / "scans" / "link").symlink_to(other.parent / "below")
    far = tmp_path / "scans" / "link" / ".." / "a.nii"  # is the other one, as links are followed first
    monkeypatch.chdir(tmp_path)
    found = expand_all([str(b), "scans/b.nii", f"{tmp_path}/scans/../scans/b.nii", "scans/*.nii", str(far), str(a)])
    assert [str(volume) for volume in found.volumes] == [str(b), "scans/a.nii", str(far)]


def test_a_link_to_itself_is_an_error_of_its_own(tmp_path, make_nifti, tiny_discovery):
    make_nifti(tmp_path / "scans" / "a.nii.gz", values(1))
    (tmp_path / "scans" / "b.nii.gz").symlink_to("b.nii.gz")
    errors = []
    segment(tmp_path / "scans", tmp_path / "out", model=str(tiny_discovery), on_error=errors.append)
    assert files(tmp_path / "out") == [f"a_dseg.{ending}" for ending in ("json", "nii.gz", "tsv")]
    assert len(errors) == 1 and isinstance(errors[0], InputError) and "b.nii.gz" in str(errors[0])


def test_a_json_list_holds_any_name(tmp_path, make_nifti):
    names = ["study #1/a.nii.gz", " spaced /b.nii.gz", "c\n.nii.gz"]
    for name in names:
        make_nifti(tmp_path / name, values(1))
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([names[0], str(tmp_path / names[1]), names[2]]))
    assert set(list_volumes(listed)) == {tmp_path / name for name in names}
    for wrong in ('{"a": 1}', "[1]", "[", '["nowhere.nii"]'):
        listed.write_text(wrong)
        with pytest.raises(InputError, match=r"list\.json"):
            list_volumes(listed)

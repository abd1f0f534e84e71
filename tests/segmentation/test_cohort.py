"""Shares, the manifest and the table of all parts: against the scans' own files, and with real processes."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from diffdiscover3d.errors import InputError, OutputError
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.segmentation.outputs import parse_share, shard

AFFINE = np.diag([-2.0, 1.5, 3.0, 1.0])
SHAPES = [(14, 10, 12), (12, 16, 9), (10, 11, 13)]


def rows(path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))


@pytest.fixture
def scans(tmp_path, make_nifti):
    rng = np.random.default_rng(0)
    for i in range(5):
        data = rng.normal(0, 0.1, SHAPES[i % 3]).astype(np.float32)
        data[3:8, 2:7, 3:8] += 1
        make_nifti(tmp_path / "in" / f"s{i}.nii.gz", data, AFFINE)
    return tmp_path / "in"


def without_seconds(path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(path)]


@pytest.mark.parametrize("share", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_bad_shares_are_named(share):
    with pytest.raises(ValueError, match=r"i/n with i in 1\.\.n"):
        parse_share(share)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_shares_are_disjoint_and_complete(monkeypatch, world):
    cases, found = list(range(11)), []
    for index in (1, 2, 3, 4):
        for rank in range(world):
            monkeypatch.setattr(
                "diffdiscover3d.segmentation.outputs.rank_and_world_size", lambda rank=rank: (rank, world)
            )
            found += shard(cases, f"{index}/4")
    assert sorted(found) == cases


def test_tables_agree_with_the_label_maps(scans, tiny_discovery, tmp_path):
    segment(scans, tmp_path / "out", model=str(tiny_discovery), summary=True)
    manifest = rows(tmp_path / "out" / "manifest.tsv")
    assert [(r["scan"], r["status"], r["error"]) for r in manifest] == [(f"s{i}", "done", "n/a") for i in range(5)]
    parts = rows(tmp_path / "out" / "parts.tsv")
    assert [(r["scan"], r["level"], r["part"]) for r in parts] == [
        (f"s{i}", "n/a", str(k)) for i in range(5) for k in range(3)
    ]
    for row in manifest:
        path = scans / row["input"]
        assert row["input_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        labels = np.asarray(nib.load(tmp_path / "out" / row["labels"]).dataobj)
        scan = nib.load(path).get_fdata()
        for part in (p for p in parts if p["scan"] == row["scan"]):
            inside = labels == int(part["part"])
            assert int(part["voxels"]) == inside.sum()
            assert float(part["volume"]) == pytest.approx(inside.sum() * 9 / 1000) and part["volume_unit"] == "mL"
            if not inside.any():
                assert part["mean_intensity"] == part["centroid_x"] == "n/a" and part["components"] == "0"
                continue
            assert float(part["mean_intensity"]) == pytest.approx(scan[inside].mean(), abs=1e-5)
            centre = nib.affines.apply_affine(AFFINE, ndimage.center_of_mass(inside))
            found = [float(part[f"centroid_{axis}"]) for axis in "xyz"]
            assert found == pytest.approx(list(centre), abs=1e-3) and part["centroid_unit"] == "mm"
            assert int(part["components"]) == ndimage.label(inside)[1]


def test_shares_complete_one_manifest(scans, tiny_discovery, tmp_path):
    options = {"model": str(tiny_discovery), "summary": True}
    segment(scans, tmp_path / "whole", **options)
    first = segment(scans, tmp_path / "shares", share="1/2", **options)
    manifest = tmp_path / "shares" / "manifest.tsv"
    assert [r["status"] for r in rows(manifest)] == ["done", "pending", "done", "pending", "done"]
    second = segment(scans, tmp_path / "shares", share="2/2", **options)
    assert len(first) == 3 and len(second) == 2
    assert without_seconds(manifest) == without_seconds(tmp_path / "whole" / "manifest.tsv")
    assert (tmp_path / "shares" / "parts.tsv").read_bytes() == (tmp_path / "whole" / "parts.tsv").read_bytes()


def test_a_failed_scan_is_recorded_until_it_is_mended(scans, tiny_discovery, tmp_path):
    good, errors = (scans / "s1.nii.gz").read_bytes(), []
    (scans / "s1.nii.gz").write_bytes(good[:100])
    options = {"model": str(tiny_discovery), "summary": True, "on_error": errors.append}
    segment(scans, tmp_path / "out", **options)
    failed = rows(tmp_path / "out" / "manifest.tsv")[1]
    assert failed["status"] == "failed" and failed["error"] == " ".join(str(errors[0]).split())
    assert not any(r["scan"] == "s1" for r in rows(tmp_path / "out" / "parts.tsv"))
    (scans / "s1.nii.gz").write_bytes(good)
    skipped = []
    segment(scans, tmp_path / "out", resume=True, on_skip=skipped.append, **options)
    assert len(skipped) == 4
    assert {(r["status"], r["error"]) for r in rows(tmp_path / "out" / "manifest.tsv")} == {("done", "n/a")}
    assert not list((tmp_path / "out").glob("*error*"))


def test_the_manifest_is_written_when_a_command_ends_with_an_error(scans, tiny_discovery, tmp_path):
    (scans / "s2.nii.gz").write_bytes(b"no volume")
    with pytest.raises(InputError):
        segment(scans, tmp_path / "out", model=str(tiny_discovery), summary=True)
    found = [r["status"] for r in rows(tmp_path / "out" / "manifest.tsv")]
    assert found == ["done", "done", "failed", "pending", "pending"]


def test_a_later_command_adds_scans(scans, tiny_discovery, tmp_path, make_nifti):
    options = {"model": str(tiny_discovery), "summary": True}
    segment([scans / "s0.nii.gz", scans / "s1.nii.gz"], tmp_path / "out", **options)
    before = rows(tmp_path / "out" / "parts.tsv")
    segment([scans / f"s{i}.nii.gz" for i in (2, 3, 4)], tmp_path / "out", **options)
    assert [r["status"] for r in rows(tmp_path / "out" / "manifest.tsv")] == ["done"] * 5
    after = rows(tmp_path / "out" / "parts.tsv")
    assert after[: len(before)] == before and len(after) == 15


def test_names_that_are_no_plain_text(scans, tiny_discovery, tmp_path):
    """A name that is not UTF-8, with a line break, or with two blanks: a row each, which later commands keep."""
    names = [b"a\xff", b"b\nc", b"d e", b"d  e"]
    for i, name in enumerate(names):
        (scans / f"s{i}.nii.gz").rename(scans / os.fsdecode(name + b".nii.gz"))
    options = {"model": str(tiny_discovery), "summary": True, "tables": True}
    segment(scans, tmp_path / "out", **options)
    found = {os.fsencode(path.name) for path in (tmp_path / "out").glob("*_dseg.ctbl")}
    assert found == {name + b"_dseg.ctbl" for name in [*names, b"s4"]}
    for table in (tmp_path / "out").glob("*_dseg.ctbl"):  # two lines of comments, then one for each of the parts
        lines = table.read_text(encoding="utf-8").splitlines()
        assert all(line.startswith("#") for line in lines[:2]) and [ln.split()[0] for ln in lines[2:]] == list("012")
    before = rows(tmp_path / "out" / "manifest.tsv")
    assert [r["scan"] for r in before] == ["a\\udcff", "b\\nc", "d  e", "d e", "s4"]
    segment(scans / "s4.nii.gz", tmp_path / "out", resume=True, **options)
    segment(scans, tmp_path / "out", resume=True, **options)
    assert rows(tmp_path / "out" / "manifest.tsv") == before
    assert len(rows(tmp_path / "out" / "parts.tsv")) == 15


def test_tables_need_a_folder(scans, tiny_discovery, tmp_path):
    options = {"model": str(tiny_discovery), "summary": True}
    for place in ({"beside_inputs": True}, {"output": tmp_path / "one.nii.gz"}):
        with pytest.raises(ValueError, match="`summary` needs an `output` folder"):
            segment(scans / "s0.nii.gz", **place, **options)
    with pytest.raises(ValueError, match="`summary` is about files that are written; name an `output`"):
        segment(scans / "s0.nii.gz", **options)


@pytest.mark.parametrize("name", ["manifest.tsv", "parts.tsv"])
def test_tables_of_others_are_not_overwritten(scans, tiny_discovery, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("subject\tage\n01\t40\n")
    with pytest.raises(OutputError, match=f"{name}: was not written by this version"):
        segment(scans, tmp_path / "out", model=str(tiny_discovery), summary=True)
    assert (tmp_path / "out" / name).read_text() == "subject\tage\n01\t40\n"


def test_a_damaged_manifest_is_written_again(scans, tiny_discovery, tmp_path):
    options = {"model": str(tiny_discovery), "summary": True}
    segment(scans, tmp_path / "out", **options)
    manifest = tmp_path / "out" / "manifest.tsv"
    expected = manifest.read_text()
    manifest.write_text(expected[: len(expected) // 2])
    segment(scans, tmp_path / "out", resume=True, **options)
    assert manifest.read_text() == expected


def test_two_ranks_of_one_share(scans, tiny_discovery, tmp_path):
    """A real launch of two processes, which divide one of two shares among them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    launch += ["diffdiscover3d.cli", "segment", scans, "-o", tmp_path / "out", "--model", tiny_discovery]
    done = subprocess.run(
        [str(c) for c in [*launch, "--summary", "--share", "1/2"]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = rows(tmp_path / "out" / "manifest.tsv")
    assert [r["status"] for r in manifest] == ["done", "pending", "done", "pending", "done"]
    segment(scans, tmp_path / "out", model=str(tiny_discovery), summary=True, share="2/2")
    assert {r["status"] for r in rows(tmp_path / "out" / "manifest.tsv")} == {"done"}
    sidecars = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").glob("*_dseg.json"))]
    assert [s["input"]["name"] for s in sidecars] == [f"s{i}.nii.gz" for i in range(5)]

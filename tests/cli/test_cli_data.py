"""The commands for BraTS and the authors' archive."""

import json
import sys

import nibabel as nib
import pytest

from diffdiscover3d.cli import app as cli
from tests.data.datasets.test_authors_archive import make_archive
from tests.helpers.brats_folders import make_brats


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("DIFFDISCOVER3D_CACHE", str(tmp_path / "cache"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["diffdiscover3d", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


BOX = ["--crop", 20, 22, 19]


def test_evaluate_brats(run, tmp_path, tiny_discovery):
    root, scores = make_brats(tmp_path / "data", "2020"), tmp_path / "scores.json"
    arguments = ["evaluate-brats", root, "-m", f"ours={tiny_discovery}", "-m", f"twice={tiny_discovery}", *BOX]
    code, out, err = run(*arguments, "--clip-percentiles", 1, 99, "-o", scores)
    assert (code, err) == (0, "")
    result = json.loads(scores.read_text())
    rows = {(row["method"], row["postprocessed"]): row for row in result["rows"]}
    assert len(rows) == 6 and rows["ours", False]["dice"] == rows["twice", False]["dice"]
    assert result["options"]["clip_percentiles"] == [1, 99] and result["options"]["crop"] == [20, 22, 19]
    for row in result["rows"]:
        assert f"{row['dice']:.3f} | {row['dice_std']:.3f} | {row['hd95_mm']:.1f}" in out
    assert run(*arguments, "-o", scores)[0] == 4, "already exists"


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ([], 3, "smaller than the crop"),
        ([*BOX, "--modality", "pd"], 2, "modality"),
        ([*BOX, "--split", "first"], 2, "split"),
        ([*BOX, "-m", "a=x", "-m", "a=y"], 2, "name of its own"),
        ([*BOX, "-m", "no-such-model"], 5, "no-such-model"),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, arguments, code, word):
    found, _, err = run("evaluate-brats", make_brats(tmp_path / "data", "2021", count=3), *arguments)
    assert found == code and word in err and len(err.splitlines()) == 1


def test_no_brats(run, tmp_path):
    code, out, err = run("evaluate-brats", tmp_path)
    assert (code, out) == (3, "") and "no BraTS cases" in err


def test_import_authors_archive(run, tmp_path):
    archive = make_archive(tmp_path / "archive", count=1)
    code, out, err = run("import-authors-archive", archive, tmp_path / "out")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    assert nib.load(out.splitlines()[0]).shape == (7, 6, 5)
    assert run("import-authors-archive", archive, tmp_path / "out")[0] == 4
    assert run("import-authors-archive", tmp_path, tmp_path / "other")[0] == 3

"""A single bad file is refused, and finished results are skipped, before anything heavy is imported."""

import subprocess
import sys

import numpy as np
import pytest

from diffdiscover3d.errors import InputError
from diffdiscover3d.segmentation import preflight
from diffdiscover3d.segmentation.driver import choose_device, segment
from diffdiscover3d.segmentation.preflight import refuse_early
from diffdiscover3d.utils.files import read_json
from tests.helpers.corpus import CORPUS, blobs

HEAVY = "print(sorted({'torch', 'monai', 'diffusers', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"


def run(folder, *arguments) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of a command in a process of its own; the last one lists what it imported."""
    code = f"import atexit, sys; atexit.register(lambda: {HEAVY}); from diffdiscover3d.cli.app import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("command", ["segment", "features"])
@pytest.mark.parametrize("name", ["trunc.nii", "missing.nii.gz", "nan.nii.gz"])
def test_without_torch(tmp_path, command, name):
    CORPUS[name][0](tmp_path / name)
    code, (error, heavy) = run(tmp_path, command, name)
    assert code == 3 and error.startswith(f"error: {name}: ") and heavy == "[]"


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", CORPUS)
def test_it_agrees_with_the_corpus(tmp_path, monkeypatch, name, large):
    """The early check refuses no file that can be read, and the command refuses the others."""
    if large:
        monkeypatch.setattr(preflight, "_READ_WHOLE", 0)
    write, expected = CORPUS[name]
    write(tmp_path / name)
    try:
        refuse_early([str(tmp_path / name)])
    except InputError:
        assert expected == 3


def test_choices_count(tmp_path):
    CORPUS["nan.nii.gz"][0](tmp_path / "nan.nii.gz")
    with pytest.raises(InputError, match="--nan-to-zero"):
        refuse_early([str(tmp_path / "nan.nii.gz")])
    refuse_early([str(tmp_path / "nan.nii.gz")], nan_to_zero=True)


def test_what_is_left_to_the_command(tmp_path, make_nifti):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"<html>")
    good = make_nifti(tmp_path / "good.nii.gz", blobs().astype(np.float32))
    for inputs in ([], [str(good), str(bad)], [str(tmp_path)], [f"{tmp_path}/*.nii.gz"], [str(tmp_path / "list.txt")]):
        refuse_early(inputs)
    refuse_early([str(bad)], device="toaster")  # a usage error, which is reported first
    with pytest.raises(InputError, match="web page"):
        refuse_early([str(bad)], device="cuda:1")


def test_finished_results_are_skipped_without_torch(tmp_path, make_nifti, tiny_discovery):
    for name in "abc":
        make_nifti(tmp_path / "in" / f"{name}.nii.gz", blobs().astype(np.int16))
    model = ("--model", tiny_discovery)
    segment(tmp_path / "in", tmp_path / "out", model=str(tiny_discovery), summary=True)
    segment(tmp_path / "in" / "a.nii.gz", tmp_path / "embedded", level="all", report=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_dseg.*")}
    skipped = [f"in/{name}.nii.gz: finished already, skipped" for name in "abc"]
    for arguments, expected in (
        (["in", "-o", "out", "--statistics", *model], [*skipped, "[]"]),
        (["in", "-o", "out", "--summary", *model, "--share", "2/3"], [skipped[1], "[]"]),
        (["in/a.nii.gz", "-o", "embedded", "--level", "all", "--report"], [skipped[0], "[]"]),
    ):
        assert run(tmp_path, "segment", *arguments, "--resume") == (0, expected)
    # what a finished result must be: of this model and these arguments
    code, (error, heavy) = run(tmp_path, "segment", "in", "-o", "out", "--resume", "--statistics")
    assert code == 5 and "was made with another model" in error and heavy == "[]"
    code, (error, heavy) = run(tmp_path, "segment", "in", "-o", "out", "--resume", "--device", "toaster", *model)
    assert code == 2 and "`device` must be" in error and heavy == "[]"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_dseg.*")} == before


def test_one_changed_result_is_made_again(tmp_path, make_nifti, tiny_discovery):
    for name in "ab":
        make_nifti(tmp_path / "in" / f"{name}.nii.gz", blobs().astype(np.int16))
    segment(tmp_path / "in", tmp_path / "out", model=str(tiny_discovery))
    table, sidecar = tmp_path / "out" / "b_dseg.tsv", tmp_path / "out" / "b_dseg.json"
    whole, arguments = table.read_bytes(), read_json(sidecar)["arguments"]
    table.write_bytes(whole[:-1])
    skipped = []
    segment(tmp_path / "in", tmp_path / "out", model=str(tiny_discovery), resume=True, on_skip=skipped.append)
    assert [path.name for path in skipped] == ["a.nii.gz"]
    assert table.read_bytes() == whole and read_json(sidecar)["arguments"] == arguments
    assert arguments["device"] == str(choose_device("auto"))

"""A single bad file is refused before anything heavy is imported."""

import subprocess
import sys

import numpy as np
import pytest

from diffdiscover3d.errors import InputError
from diffdiscover3d.segmentation import preflight
from diffdiscover3d.segmentation.preflight import refuse_early
from tests.helpers.corpus import CORPUS, blobs

HEAVY = "print(sorted({'torch', 'monai', 'diffusers', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"


@pytest.mark.parametrize("command", ["segment", "features"])
@pytest.mark.parametrize("name", ["trunc.nii", "missing.nii.gz", "nan.nii.gz"])
def test_without_torch(tmp_path, command, name):
    CORPUS[name][0](tmp_path / name)
    code = f"import atexit, sys; atexit.register(lambda: {HEAVY}); from diffdiscover3d.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code, command, name], capture_output=True, text=True, cwd=tmp_path)
    error, heavy = done.stderr.splitlines()
    assert done.returncode == 3 and error.startswith(f"error: {name}: ") and heavy == "[]"


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

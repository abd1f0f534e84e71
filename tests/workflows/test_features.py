"""Commands that write several files write all of them or none."""

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.errors import OutputError
from diffdiscover3d.workflows import features, generate, synthesize
from diffdiscover3d.workflows.features import extract_features
from diffdiscover3d.workflows.generate import generate_volumes
from diffdiscover3d.workflows.synthesize import write_synthetic
from tests.helpers.corpus import blobs


def failing_after(monkeypatch, module, name: str, successes: int, error: BaseException) -> None:
    """Make a writer of the module fail after some calls."""
    write, calls = getattr(module, name), []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) > successes:
            raise error
        return write(*arguments, **options)

    monkeypatch.setattr(module, name, fail)


ERRORS = [OutputError("the disk is full"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS)
def test_features(tmp_path, make_nifti, monkeypatch, error):
    scan = make_nifti(tmp_path / "scan.nii.gz", blobs().astype(np.float32))
    out = tmp_path / "out"
    failing_after(monkeypatch, features, "write_like", 2, error)
    with pytest.raises(type(error)):
        extract_features(scan, out, stages=(1, 2, 3))
    assert not out.exists()
    monkeypatch.undo()
    paths = extract_features(scan, out, stages=(1, 2, 3))
    assert sorted(out.iterdir()) == paths and len(paths) == 3
    before = {p: p.read_bytes() for p in paths}
    failing_after(monkeypatch, features, "write_like", 1, error)
    with pytest.raises(type(error)):
        extract_features(scan, out, stages=(1, 2, 3), seed=1, overwrite=True)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("error", ERRORS)
def test_generate(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    failing_after(monkeypatch, generate, "save_slices", 0, error)
    with pytest.raises(type(error)):
        generate_volumes(out, count=2, steps=1)
    assert not out.exists()
    monkeypatch.undo()
    assert sorted(generate_volumes(out, count=2, steps=1)) == sorted(out.iterdir())


@pytest.mark.parametrize("error", ERRORS)
def test_synthesize(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    out.mkdir()
    failing_after(monkeypatch, synthesize, "write_volume", 5, error)  # between the files of the second volume
    with pytest.raises(type(error)):
        write_synthetic(out, count=2)
    assert list(out.iterdir()) == []
    monkeypatch.undo()
    write_synthetic(out, count=2)
    assert len(list(out.iterdir())) == 8 and nib.load(next(out.glob("*-001.nii.gz"))).shape == (50, 50, 50)

"""What the package writes has the permissions that the umask leaves, also in a folder that a group shares."""

import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffdiscover3d.hub import embedded_models, registry
from diffdiscover3d.hub.registry import load_discovery, pull
from diffdiscover3d.segmentation.driver import segment
from diffdiscover3d.train import run
from diffdiscover3d.training.config import DiffusionConfig, make_config
from diffdiscover3d.utils.staging import replaced_folder, staged_folder
from diffdiscover3d.workflows.features import extract_features
from diffdiscover3d.workflows.generate import generate_volumes
from diffdiscover3d.workflows.reports import make_reports
from diffdiscover3d.workflows.synthesize import write_synthetic

SMALL = {"preset": "small", "width": 8, "sample_size": 8, "mixed_precision": "no", "memory_format": "channels_last"}


@pytest.fixture(params=[0o002, 0o027], ids=["002", "027"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def shared(tmp_path, umask):
    """A folder whose group the files in it inherit."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o2777 & ~umask)
    return folder


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Files and folders whose permissions differ from those that `open` and `mkdir` give them."""
    (folder / "made").mkdir()
    (folder / "made" / "file").touch()
    expected = {kind: path.stat().st_mode for kind, path in ((True, folder / "made"), (False, folder / "made/file"))}
    assert expected[True] == stat.S_IFDIR | 0o2777 & ~umask and expected[False] == stat.S_IFREG | 0o666 & ~umask
    return {
        path.relative_to(folder).as_posix(): oct(path.stat().st_mode)
        for path in folder.rglob("*")
        if path.stat().st_mode != expected[path.is_dir()]
    }


def test_results(shared, umask, make_nifti, tiny_discovery):
    values = np.random.default_rng(0).random((12, 10, 9)).astype(np.float32)
    scan = make_nifti(shared / "scans" / "sub-1.nii.gz", values)
    np.save(shared / "array.npy", values)
    everything = {"preview": True, "tables": True, "probabilities": True, "report": True, "summary": True}
    segment(scan, shared / "parts", model=str(tiny_discovery), **everything)
    (shared / "parts" / "sub-1_report.html").unlink()
    make_reports(scan, parts=shared / "parts")
    segment(shared / "array.npy", shared / "parts", model=str(tiny_discovery), probabilities=True)
    extract_features(scan, shared / "features", stages=(1,), preview=True)
    write_synthetic(shared / "synthetic", count=1)
    generate_volumes(shared / "generated", steps=1, grid=(8, 8, 8))
    assert len([p for p in shared.rglob("*") if p.is_file()]) > 20
    assert wrong_modes(shared, umask) == {}


def test_trainings_and_models(shared, umask, make_nifti, tmp_path, monkeypatch):
    scans = make_nifti(tmp_path / "scans" / "a.nii.gz", np.random.default_rng(0).random((8, 8, 8)).astype(np.float32))
    options = {**SMALL, "dataset": str(scans.parent), "output_dir": str(shared / "trained"), "batch_size": 1}
    run(make_config(DiffusionConfig, **options, max_steps=2, checkpoint_every=1, preview_every=1))
    written = {p.relative_to(shared / "trained").as_posix() for p in shared.rglob("*.safetensors")}
    assert {"unet/diffusion_pytorch_model.safetensors", "checkpoints/checkpoint-00000002/ema.safetensors"} <= written
    load_discovery("synthetic-regular").save_pretrained(shared / "saved" / "by_hand")
    snapshot = embedded_models()["synthetic-regular"].folder / "discovery"
    monkeypatch.setattr(registry, "fetch_snapshot", lambda *_, **__: snapshot)
    pull("user/name", shared / "pulled")
    assert wrong_modes(shared, umask) == {}


def test_files_that_other_programs_create_for_their_owner_only(shared, umask, tmp_path):
    """Private files, and a link, whose target stays as it is."""
    private = tmp_path / "private"
    private.touch(mode=0o600)
    for context in (staged_folder, replaced_folder):
        with context(shared / context.__name__) as folder:
            (folder / "inner").mkdir(mode=0o700)
            save_file({"x": np.zeros(3)}, folder / "inner" / "weights.safetensors")
            with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
                archive.writestr("a", "b")
            (folder / "archive.zip").chmod(0o400)
            (folder / "inner" / "link").symlink_to(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    for link in shared.rglob("link"):
        link.unlink()
    assert wrong_modes(shared, umask) == {}

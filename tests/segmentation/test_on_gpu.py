"""`segment` on a simulated GPU: parts and probabilities are those of the CPU."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.segmentation.driver import segment
from tests.helpers.simulated_gpu import simulated_gpu


def cell():
    volume = np.random.default_rng(0).normal(0, 0.1, (40, 34, 28)).astype(np.float32)
    volume[6:34, 5:29, 4:24] += 1
    volume[10:20, 8:17, 7:16] += 1
    volume[22:31, 18:27, 8:20] += 1.5
    return volume


def brain():
    return 200 * np.asarray(brain_phantom("test", 0).volume[::2, ::2, ::2])


@pytest.fixture
def windowed(tiny_discovery, tmp_path):
    """A network whose window is smaller than the scan."""
    config = json.loads((tiny_discovery / "config.json").read_text())
    folder = tmp_path / "windowed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "window_size": 24}))
    for weights in tiny_discovery.glob("*.safetensors"):
        (folder / weights.name).symlink_to(weights)
    return str(folder)


@pytest.mark.parametrize(
    ("model", "scan", "options"),
    [
        ("synthetic-regular", cell, {"level": "all"}),
        ("brain-flair", brain, {}),
        ("windowed", cell, {}),
    ],
)
def test_results_are_those_of_the_cpu(model, scan, options, windowed, tmp_path, monkeypatch):
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(scan(), np.diag([1.0, 1.0, 1.5, 1.0])), path)
    fixed = {"model": windowed if model == "windowed" else model, "probabilities": True, **options}
    segment(path, tmp_path / "cpu", device="cpu", **fixed)
    with simulated_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)  # everything is float32
        segment(path, tmp_path / "gpu", device="cuda", **fixed)
    assert gpu.waits
    files = sorted(file.name for file in (tmp_path / "cpu").glob("*.nii.gz"))
    assert len(files) >= 2
    for name in files:
        ours, theirs = (np.asarray(nib.load(tmp_path / place / name).dataobj) for place in ("gpu", "cpu"))
        if "probseg" in name:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            assert (ours == theirs).mean() > 0.9999

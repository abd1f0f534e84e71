"""Both phases at a target spacing, on scans of several spacings and shapes."""

import json

import nibabel as nib
import numpy as np
import pytest

from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.losses import smoothness, spatial_consistency
from diffdiscover3d.train import run
from diffdiscover3d.training.config import DiffusionConfig, DiscoveryConfig, make_config
from diffdiscover3d.training.discovery import DiscoveryTraining

SMALL = {"preset": "small", "mixed_precision": "no", "memory_format": "channels_last", "preview_every": 0}
SCANS = [((14, 12, 20), (1, 1, 1)), ((7, 6, 10), (2, 2, 2)), ((14, 12, 6), (1, 1, 3)), ((12, 12, 8), (1, 1, 3))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Balls of 8 mm in scans of several spacings and fields of view, and a teacher."""
    root = tmp_path_factory.mktemp("spacings")
    rng = np.random.default_rng(0)
    for number, (shape, edges) in enumerate(SCANS):
        places = np.meshgrid(*[(np.arange(n) - n / 2) * e for n, e in zip(shape, edges, strict=True)], indexing="ij")
        data = (sum(p**2 for p in places) < 16) + rng.normal(0, 0.1, shape)
        (root / "scans").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([*edges, 1])), root / "scans" / f"{number}.nii.gz")
    config = make_config(
        DiffusionConfig, **SMALL, width=8, sample_size=8, max_steps=2, batch_size=2, spacing=(1, 1, 2),
        dataset=str(root / "scans"), output_dir=str(root / "teacher"),
    )  # fmt: skip
    run(config)
    return root


def options(folder, output, **more):
    return {
        **SMALL, "dataset": str(folder / "scans"), "teacher": str(folder / "teacher"), "num_parts": 2, "dropout": 0.0,
        "batch_size": 4, "max_steps": 2, "output_dir": str(output), "selection": "last", **more,
    }  # fmt: skip


def test_scans_keep_their_shapes_at_the_target_spacing(folder, tmp_path, monkeypatch):
    seen, losses = [], DiscoveryTraining.losses
    monkeypatch.setattr(
        DiscoveryTraining,
        "losses",
        lambda self, model, batch: seen.append(batch["volume"].shape) or losses(self, model, batch),
    )
    weights = {"lambda_smooth": 0.1, "lambda_spatial": 0.1}
    run(make_config(DiscoveryConfig, **options(folder, tmp_path / "one", spacing=(1, 1, 2), **weights)))
    # one by one, so that none is stretched: 4 volumes in each of 2 steps
    assert set(seen) == {(1, 1, 14, 12, 10), (1, 1, 14, 12, 9), (1, 1, 12, 12, 12)} and len(seen) == 8
    model = load_discovery(str(tmp_path / "one"))
    assert tuple(model.config.spacing) == (1, 1, 2) and model.config.spacing_unit == "mm"
    # a network that divides its parts, or goes on from it, has its spacing
    for name in ("parent", "init_from"):
        seen.clear()
        more = {name: str(tmp_path / "one"), "num_parts": 4 if name == "parent" else 2, "max_steps": 1}
        run(make_config(DiscoveryConfig, **options(folder, tmp_path / name, **more)))
        found = load_discovery(str(tmp_path / name))
        assert all(tuple(level.config.spacing) == (1, 1, 2) for level in found.levels) and len(seen) == 4
        with pytest.raises(ValueError, match="`spacing` must be that of --init-from or --parent"):
            run(make_config(DiscoveryConfig, **options(folder, tmp_path / "other", **more, spacing=(2, 2, 2))))
    assert json.loads((tmp_path / "parent" / "config.json").read_text())["parent"]["spacing"] == [1, 1, 2]


def test_refused_combinations(folder, tmp_path):
    for more, word in (
        ({"volume_size": (8, 8, 8)}, "`volume_size` must be left out with --spacing"),
        ({"norm": "batch"}, "use --norm instance"),
        ({"init_from": "synthetic-regular", "num_parts": 8}, "the network of --init-from or --parent has none"),
    ):
        with pytest.raises(ValueError, match=word):
            run(make_config(DiscoveryConfig, **{**options(folder, tmp_path / "o", spacing=(1, 1, 2)), **more}))
    for spacing in ((1, 2), (1, 0, 1)):
        with pytest.raises(ValueError, match="`spacing` must be one or three positive numbers"):
            make_config(DiscoveryConfig, spacing=spacing)
    assert make_config(DiscoveryConfig, spacing=(2,)).spacing == (2, 2, 2)


def test_spatial_losses_are_in_millimetres(folder, tmp_path, monkeypatch):
    """Without a target spacing, volumes are stretched to one grid; the losses get the spacing on it."""
    asked = []
    for name, original in (("smoothness", smoothness), ("spatial_consistency", spatial_consistency)):
        monkeypatch.setattr(
            f"diffdiscover3d.training.assignments.{name}",
            lambda *given, original=original: asked.append(given[-1]) or original(*given),
        )
    weights = {"lambda_smooth": 0.1, "lambda_spatial": 0.1, "num_parts": 3, "max_steps": 1}
    run(make_config(DiscoveryConfig, **options(folder, tmp_path / "one", volume_size=(7, 6, 10), **weights)))
    extents = np.array([np.multiply(shape, edges) for shape, edges in SCANS])
    assert asked == [pytest.approx(np.median(extents / (7, 6, 10), axis=0))] * 2

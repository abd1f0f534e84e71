"""The embedded models of `brain-flair`, network and diffusion model, on phantoms that they have not seen."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from diffdiscover3d.cli.app import app
from diffdiscover3d.data.datasets.brain_phantom import SPACING_MM, brain_phantom
from diffdiscover3d.data.transforms import min_max_normalize
from diffdiscover3d.evaluation.metrics import binary_dice
from diffdiscover3d.hub.registry import embedded_models, load_discovery, load_teacher
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline

BACKGROUND, BRAIN, LESION = 0, 1, 2
MIB = 2**20


@pytest.fixture(scope="module")
def model():
    return load_discovery("brain-flair")


def test_it_is_nested_framed_and_small(model):
    assert [level.config.num_parts for level in model.levels] == [2, 3] and model.parents == (0, 1, 1)
    assert model.config.scaling == "robust" and tuple(model.config.frame) == (96, 112, 96)
    sizes = {
        name: sum(p.stat().st_size for p in embedded.folder.rglob("*.safetensors"))
        for name, embedded in embedded_models().items()
    }
    assert sizes["brain-flair"] <= 8 * MIB and sum(sizes.values()) <= 20_000_000


@pytest.mark.parametrize("index", [0, 2])
def test_parts_have_constant_numbers(model, index):
    phantom = brain_phantom("validation", index)
    labels = model.segment(phantom.volume).labels[0].numpy()
    assert binary_dice(labels != BACKGROUND, phantom.labels[0] == 1) > 0.9
    assert binary_dice(labels == LESION, phantom.labels[1] == 2) > 0.7


def test_a_healthy_phantom_has_nearly_no_lesion(model):
    phantom = brain_phantom("test", 3)
    labels = model.segment(phantom.volume).labels[0].numpy()
    assert (labels == LESION).sum() * SPACING_MM**3 / 1000 < 2


def test_level_1_agrees_with_level_2(model):
    volume = brain_phantom("validation", 1).volume
    coarse, fine = (level.segment(volume).labels[0].numpy() for level in model.levels)
    assert np.mean((coarse == BRAIN) == (fine != BACKGROUND)) > 0.98


def test_its_card_is_that_of_the_repository():
    card = (Path(__file__).parents[2] / "hub_cards" / "brain-flair.md").read_text(encoding="utf-8")
    links = "](https://github.com/diffdiscover3d/diffdiscover3d/blob/main/"
    own = embedded_models()["brain-flair"].folder / "README.md"
    assert own.read_text(encoding="utf-8") == card.replace("](../", links)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("brain-flair")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_it_has_a_diffusion_model_of_its_own(teacher):
    own, default = (embedded_models()[name] for name in ("brain-flair", "synthetic-regular"))
    assert own.diffusion == own.folder / "diffusion" and own.diffusion != default.diffusion
    weights = teacher.unet.state_dict()
    loaded = DiffusionFeaturePipeline.from_pretrained("brain-flair").unet
    alone = UNet3DModel.from_pretrained("brain-flair", subfolder="unet")
    for other in (loaded, alone):
        assert all(torch.equal(other.state_dict()[name], value) for name, value in weights.items())
    cells = load_teacher("synthetic-regular").unet.state_dict()
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert not any(torch.equal(cells[name], value) for name, value in weights.items() if value.dim() == 5)


def test_features_have_their_shapes_and_are_deterministic(teacher):
    volume = brain_phantom("validation", 1).volume[8:84, 6:106, 10:78]
    first, second = (teacher(volume, generator=seeded()) for _ in range(2))
    assert [tuple(f.shape) for f in first.features] == [(1, 64, 6, 6, 6), (1, 32, 12, 12, 12), (1, 16, 24, 24, 24)]
    assert first.extent == (76, 100, 68)
    assert all(torch.equal(a, b) for a, b in zip(first.features, second.features, strict=True))
    cells = load_teacher("synthetic-regular")(volume, generator=seeded())
    for ours, theirs in zip(first.features, cells.features, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().mean() > 0.2 * theirs.abs().mean()


@pytest.mark.parametrize("timestep", [25, 150])
def test_it_predicts_brains_better_than_the_model_of_cells(teacher, timestep):
    volume = brain_phantom("test", 1).volume
    clean = min_max_normalize(torch.from_numpy(volume)[None, None])
    cells = load_teacher("synthetic-regular")
    ours, theirs = (
        float((pipe(volume, timestep, generator=seeded(), denoised=True).denoised - clean).abs().mean())
        for pipe in (teacher, cells)
    )
    assert ours < 0.7 * theirs


def test_the_command_writes_its_features(teacher, tmp_path):
    volume = brain_phantom("validation", 2).volume[10:80, :, 12:90]
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(volume, np.diag([1.5, 1.5, 1.5, 1])), scan)
    command = ["features", str(scan), "--model", "brain-flair", "--stage", "3", "--seed", "3", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = nib.load(tmp_path / "scan_stage3.nii.gz")
    expected = teacher(volume, stages=(3,), generator=seeded()).features[0][0]
    assert written.shape == (24, 24, 24, 16)
    np.testing.assert_array_equal(np.moveaxis(written.get_fdata(dtype=np.float32), 3, 0), expected.numpy())
    # corner voxels of the features lie on those of the scan
    np.testing.assert_allclose(written.header.get_zooms()[:3], [1.5 * (n - 1) / 23 for n in volume.shape], rtol=1e-5)

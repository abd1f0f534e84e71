"""The feature pipeline against its formulas, and saving and loading."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffdiscover3d.errors import InputError
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline, make_scheduler, upsample_features

GRID = (10, 7, 12)


def make_pipeline(**config) -> DiffusionFeaturePipeline:
    torch.manual_seed(0)
    config = {"width": 8, "channel_multipliers": (1, 2, 2), "attention": (None,) * 3, "norm_groups": 4, **config}
    return DiffusionFeaturePipeline(UNet3DModel(**config).eval(), make_scheduler(250))


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cosine_alpha_bar(steps: int) -> torch.Tensor:
    """The cosine schedule of Nichol and Dhariwal, as in the authors' code."""
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    betas = [min(1 - f[t + 1] / f[t], 0.999) for t in range(steps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)


def test_schedule_is_the_cosine_one():
    torch.testing.assert_close(make_scheduler(250).alphas_cumprod.double(), cosine_alpha_bar(250), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 25, 249])
def test_features_of_the_noised_volume(timestep):
    pipe, volume = make_pipeline(), torch.rand(GRID) * 40 - 7
    out = pipe(volume, timestep, stages=(1, 2), generator=seeded(3))
    noise = torch.randn(1, 1, 1, *GRID, generator=seeded(3))[0]
    clean = 2 * (volume - volume.min()) / (volume.max() - volume.min()) - 1
    alpha = cosine_alpha_bar(250)[timestep].float()
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    expected = pipe.unet(noisy, timestep, stages=(1, 2)).features
    for ours, theirs in zip(out.features, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert out.extent == (12, 8, 12) and out.stages == (1, 2) and out.denoised is None


@torch.no_grad()
def test_autocast_does_not_round_the_noise():
    """In bfloat16, the noise level would be .177 instead of .173 at t=25, and 0 at t=0."""
    pipe, volume = make_pipeline(sample_size=8, resize_before_noise=True), torch.rand(1, 1, *GRID)
    noise = torch.randn(1, 1, 1, 8, 8, 8, generator=seeded())
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pipe.extract(volume, noise, 25, (1,))
    assert seen[0].dtype == seen[1].dtype == torch.float32 and torch.equal(*seen)


@torch.no_grad()
def test_several_draws_are_averaged():
    pipe, volume = make_pipeline(), torch.rand(GRID)
    one_generator = seeded()
    single = [pipe(volume, stages=(2,), generator=one_generator).features[0] for _ in range(3)]
    together = pipe(volume, stages=(2,), generator=seeded(), num_noise=3).features[0]
    torch.testing.assert_close(together, torch.stack(single).mean(dim=0))


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"sample_size": 8}, {"sample_size": 8, "resize_before_noise": True}])
def test_upsampled_features_lie_on_the_voxels(config):
    pipe, volume = make_pipeline(**config), torch.rand(GRID)
    coarse = pipe(volume, stages=(1, 2), generator=seeded())
    assert coarse.extent == ((12, 8, 12) if not config else GRID)
    for chunk in (1, 3, 32):
        fine = pipe(volume, stages=(1, 2), generator=seeded(), upsample=True, chunk_channels=chunk)
        assert fine.extent == GRID
        for f, c in zip(fine.features, coarse.features, strict=True):
            expected = F.interpolate(c, size=coarse.extent, mode="trilinear", align_corners=True)
            torch.testing.assert_close(f, expected[..., : GRID[0], : GRID[1], : GRID[2]])


@torch.no_grad()
def test_noise_is_drawn_on_the_internal_grid_when_the_model_says_so():
    pipe = make_pipeline(sample_size=8, resize_before_noise=True)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    out = pipe(torch.rand(GRID), stages=(1,), generator=seeded(), denoised=True)
    assert seen == [(8, 8, 8)]
    assert out.denoised.shape == (1, 1, *GRID) and out.denoised.min() >= 0 and out.denoised.max() <= 1


@torch.no_grad()
def test_denoised_is_the_networks_prediction():
    pipe, volume = make_pipeline(), torch.rand(2, *GRID)
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, 0.5)
    out = pipe(volume, stages=(), generator=seeded(), num_noise=2, denoised=True)
    torch.testing.assert_close(out.denoised, torch.full((2, 1, *GRID), 0.75))
    assert out.features == ()


@torch.no_grad()
def test_any_kind_of_volume(tmp_path):
    pipe, data = make_pipeline(), np.random.default_rng(0).normal(100, 20, GRID).astype(np.float32)
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])  # left to right, so the canonical data is flipped
    image = nib.Nifti1Image(data, affine)
    nib.save(image, tmp_path / "scan.nii.gz")
    expected = pipe(data[::-1], stages=(1,), generator=seeded()).features[0]
    tensor = torch.from_numpy(data[::-1].copy())
    for volume in (
        tmp_path / "scan.nii.gz",
        str(tmp_path / "scan.nii.gz"),
        image,
        tensor,
        tensor[None],
        tensor[None, None],
    ):
        torch.testing.assert_close(pipe(volume, stages=(1,), generator=seeded()).features[0], expected)


@pytest.mark.parametrize(
    ("volume", "arguments", "error", "message"),
    [
        (torch.rand(GRID), {"timestep": 250}, ValueError, r"0\.\.249, got 250"),
        (torch.rand(GRID), {"num_noise": 0}, ValueError, "num_noise"),
        (torch.rand(GRID), {"stages": (4,)}, ValueError, r"1\.\.2"),
        (torch.ones(GRID), {}, InputError, "no contrast"),
        (torch.rand(3, 2, *GRID), {}, InputError, "B, 1, H, W, D"),
        (torch.rand(GRID[:2]), {}, InputError, "H, W, D"),
        (torch.rand(GRID) * 1j, {}, InputError, "real"),
        ("absent.nii.gz", {}, InputError, "no such file"),
    ],
)
def test_bad_arguments_are_named(volume, arguments, error, message):
    with pytest.raises(error, match=message):
        make_pipeline()(volume, **{"stages": (1,), **arguments})


@torch.no_grad()
def test_round_trip_through_a_folder(tmp_path):
    pipe, volume = make_pipeline(sample_size=(8, 4, 8)), torch.rand(GRID)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionFeaturePipeline.from_pretrained(tmp_path)
    again = DiffusionFeaturePipeline.from_pretrained(tmp_path)
    features = [p(volume, stages=(1, 2), generator=seeded()).features for p in (pipe, loaded, again)]
    for original, a, b in zip(*features, strict=True):
        torch.testing.assert_close(a, original)
        assert torch.equal(a, b)
    assert loaded.scheduler.config.prediction_type == "sample"
    # stored by library and class instead of module path, so that published models survive refactoring
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffdiscover3d", "UNet3DModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]


@torch.no_grad()
def test_half_precision_pipelines_compute_in_float32(tmp_path):
    pipe = make_pipeline()
    torch.nn.Module.to(pipe.unet, torch.float16)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionFeaturePipeline.from_pretrained(tmp_path)
    assert loaded.unet.dtype == torch.float32


def put_into_cache(folder: Path, cache: Path, repo: str) -> None:
    """Put a folder into a Hub cache as a completed download."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots").mkdir()
    (root / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)


def test_loads_by_hub_id_offline(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    put_into_cache(tmp_path / "model", tmp_path / "cache", "someone/cells")
    code = (
        "import torch; from diffdiscover3d import DiffusionFeaturePipeline as P, VolumeGenerationPipeline as G;"
        "p = P.from_pretrained('someone/cells'); G.from_pretrained('someone/cells');"
        "print(tuple(p(torch.rand(8, 4, 8), stages=(1,)).features[0].shape))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "(1, 16, 2, 1, 2)", done.stderr


def test_upsampling_one_voxel_features_spreads_them():
    features = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1, 1)
    fine = upsample_features(features, (3, 2, 4))
    assert torch.equal(fine, features.expand(1, 2, 3, 2, 4))

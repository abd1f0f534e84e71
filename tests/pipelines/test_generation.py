"""Sampling with a network that predicts a known volume converges to that volume."""

import pytest
import torch

from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import make_scheduler
from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline, make_ddim_scheduler


def make_pipeline(ddim: bool, steps: int = 20, answer: float | None = None, **config) -> VolumeGenerationPipeline:
    torch.manual_seed(0)
    unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None,) * 2, norm_groups=4, **config).eval()
    if answer is not None:
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.constant_(unet.conv_out.bias, answer)
    scheduler = make_scheduler(steps)
    pipeline = VolumeGenerationPipeline(unet, make_ddim_scheduler(scheduler) if ddim else scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("ddim", [True, False])
def test_a_network_that_knows_the_answer(ddim):
    out = make_pipeline(ddim, answer=-0.4)((6, 8, 4), batch_size=2)
    assert out.volumes.shape == (2, 1, 6, 8, 4)
    torch.testing.assert_close(out.volumes, torch.full_like(out.volumes, 0.3), atol=2e-3, rtol=0)


@pytest.mark.parametrize("ddim", [True, False])
def test_seeds_decide(ddim):
    pipeline = make_pipeline(ddim)
    a, b, c = (pipeline(8, generator=torch.Generator().manual_seed(s)).volumes for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and a.max() <= 1


def test_number_of_steps_and_default_grid():
    pipeline = make_pipeline(ddim=True, sample_size=4)
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    assert pipeline(num_inference_steps=5).volumes.shape == (1, 1, 4, 4, 4) and len(calls) == 5


def test_noise_stays_on_the_grid_the_model_knows():
    pipeline = make_pipeline(ddim=True, sample_size=4, resize_before_noise=True)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    assert pipeline((6, 9, 5), num_inference_steps=2).volumes.shape == (1, 1, 6, 9, 5)
    assert seen == [(4, 4, 4)] * 2


def test_few_ddim_steps_start_at_the_last_timestep():
    pipeline = make_pipeline(ddim=True)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [19, 14, 9, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "grid"), ({"grid": 4, "num_inference_steps": 21}, r"1\.\.20"), ({"grid": 4, "batch_size": 0}, "batch_size")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(ddim=True)(**arguments)


def test_round_trip(tmp_path):
    pipeline = make_pipeline(ddim=False)
    pipeline.save_pretrained(tmp_path)
    loaded = VolumeGenerationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    a, b = (p(4, generator=torch.Generator().manual_seed(0)).volumes for p in (pipeline, loaded))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

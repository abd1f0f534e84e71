"""Sampling with diffusers' schedulers against hand-written loops, and refusals of those that do not fit."""

import logging

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback

from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.pipelines.generation import VolumeGenerationPipeline

GRID = (6, 8, 4)
# kinds of prediction, and schedulers that implement them
FITTING = [
    *[("sample", s) for s in (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler)],
    *[("sample", s) for s in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, LMSDiscreteScheduler)],
    *[("epsilon", s) for s in (DDPMScheduler, PNDMScheduler, EulerAncestralDiscreteScheduler)],
    *[("v_prediction", s) for s in (DDIMScheduler, EulerDiscreteScheduler)],
]


def make_scheduler(prediction_type: str = "sample", steps: int = 20) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)


def make_pipeline(prediction_type: str = "sample", kind=VolumeGenerationPipeline, **config):
    torch.manual_seed(0)
    config = {"width": 8, "channel_multipliers": (1, 2), "attention": (None,) * 2, "norm_groups": 4, **config}
    pipe = kind(UNet3DModel(**config).eval(), make_scheduler(prediction_type))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
@pytest.mark.parametrize(("prediction_type", "scheduler"), FITTING)
def test_sampling_is_the_loop_of_diffusers(prediction_type, scheduler):
    pipe = make_pipeline(prediction_type)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    ours = pipe(GRID, batch_size=2, num_inference_steps=5, generator=seeded(3)).volumes

    loop, generator = scheduler.from_config(make_scheduler(prediction_type).config), seeded(3)
    sample = torch.randn(2, 1, *GRID, generator=generator)
    loop.set_timesteps(5)
    sample = sample * loop.init_noise_sigma
    extra = {"generator": generator} if scheduler in (DDPMScheduler, EulerAncestralDiscreteScheduler) else {}
    for t in loop.timesteps:
        prediction = pipe.unet(loop.scale_model_input(sample, t), t.expand(2)).sample
        sample = loop.step(prediction, t, sample, **extra).prev_sample
    torch.testing.assert_close(ours, (sample.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-5)
    assert ours.std() > 1e-3  # not clipped to a constant


def test_eta_reaches_ddim():
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    plain, noisy = (pipe(GRID, num_inference_steps=4, generator=seeded(), eta=eta).volumes for eta in (0.0, 1.0))
    assert not torch.allclose(plain, noisy, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler does not fit: .* DDPM family"),
        (PNDMScheduler.from_config(make_scheduler().config), "PNDMScheduler does not fit: .*`v_prediction`"),
        (EulerAncestralDiscreteScheduler.from_config(make_scheduler().config), "not implemented yet: sample"),
        (DDIMInverseScheduler.from_config(make_scheduler().config), "from volumes to noise"),
        (DDIMScheduler(num_train_timesteps=20, prediction_type="sample"), "another noise schedule"),
        (DDIMScheduler.from_config(make_scheduler(steps=30).config), "30 timesteps, the model was trained with 20"),
        (DDIMScheduler.from_config(make_scheduler("epsilon").config), "'epsilon', the model predicts 'sample'"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused_with_the_reason(scheduler, message):
    pipe = make_pipeline()
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(GRID, num_inference_steps=4)


def test_a_pipeline_cannot_be_made_with_another_family():
    with pytest.raises(ValueError, match="does not fit"):
        VolumeGenerationPipeline(make_pipeline().unet, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="must be a scheduler of diffusers, got str"):
        DiffusionFeaturePipeline(make_pipeline().unet, "ddim")


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_denoised_is_diffusers_prediction_of_the_original_sample(prediction_type):
    pipe, volume = make_pipeline(prediction_type, DiffusionFeaturePipeline), torch.rand(GRID)
    ours = pipe(volume, timestep=12, stages=(1,), generator=seeded(), denoised=True)
    clean = 2 * (volume - volume.min()) / (volume.max() - volume.min()) - 1
    noise, scheduler = torch.randn(1, 1, *GRID, generator=seeded()), make_scheduler(prediction_type)
    noisy = scheduler.add_noise(clean[None, None], noise, torch.tensor([12]))
    out = pipe.unet(noisy, 12, stages=(1,))
    expected = scheduler.step(out.sample, 12, noisy).pred_original_sample  # clipped to [-1, 1]
    torch.testing.assert_close(ours.denoised, (expected + 1) / 2, rtol=0, atol=1e-5)
    assert torch.equal(ours.features[0], out.features[0])


@torch.no_grad()
def test_features_do_not_depend_on_the_sampler():
    pipe, volume = make_pipeline(kind=DiffusionFeaturePipeline), torch.rand(GRID)
    expected = pipe(volume, timestep=9, stages=(1,), generator=seeded()).features[0]
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # its add_noise scales differently
    assert torch.equal(pipe(volume, timestep=9, stages=(1,), generator=seeded()).features[0], expected)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_each_generator_gives_the_sample_of_a_single_run(scheduler):
    pipe = make_pipeline()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    together = pipe(GRID, 3, 6, [seeded(s) for s in (5, 7, 9)]).volumes
    alone = torch.cat([pipe(GRID, 1, 6, seeded(s)).volumes for s in (5, 7, 9)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="list of `batch_size` 3, got 2"):
        pipe(GRID, 3, 6, [seeded(), seeded()])


def test_callbacks_see_every_step_and_change_the_sample():
    pipe = make_pipeline()
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), pipeline.num_timesteps, sorted(tensors), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else {}

    names = ["latents", "prediction"]
    steps = {"num_inference_steps": 5, "callback_on_step_end_tensor_inputs": names}
    volumes = pipe(GRID, callback_on_step_end=watch, **steps).volumes
    pipe.scheduler.set_timesteps(5)
    assert seen == [(i, int(t), 5, names, (1, 1, *GRID)) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert torch.equal(volumes, torch.full((1, 1, *GRID), 0.5))
    with pytest.raises(ValueError, match="latents, prediction, got"):
        pipe(GRID, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_callback_objects_of_diffusers_stop_the_sampling():
    class Stop(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._interrupt = step_index >= self.config.cutoff_step_index
            return callback_kwargs

    pipe, calls = make_pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    stop = Stop(cutoff_step_ratio=None, cutoff_step_index=1)
    pipe(GRID, num_inference_steps=5, callback_on_step_end=stop)
    assert len(calls) == 2
    pipe(GRID, num_inference_steps=5)  # the interruption ends with the call
    assert len(calls) == 7


def test_output_types_of_generation():
    pipe = make_pipeline()
    call = {"grid": GRID, "batch_size": 2, "num_inference_steps": 2}
    tensor = pipe(**call, generator=seeded()).volumes
    array = pipe(**call, generator=seeded(), output_type="np").volumes
    (images,) = pipe(**call, generator=seeded(), output_type="nifti", return_dict=False)
    assert isinstance(array, np.ndarray) and np.array_equal(array, tensor.numpy())
    for image, one in zip(images, tensor, strict=True):
        assert image.header.get_zooms() == (1, 1, 1) and image.header.get_xyzt_units()[0] == "mm"
        assert np.array_equal(image.get_fdata(dtype=np.float32), one[0].numpy())
    with pytest.raises(ValueError, match=r"`output_type` must be one of .*'pil'"):
        pipe(**call, output_type="pil")


def test_given_latents_are_the_initial_noise():
    pipe = make_pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(1, 1, *GRID, generator=seeded(4))
    a, b = pipe(GRID, 1, 3, seeded(4)).volumes, pipe(GRID, 1, 3, latents=noise).volumes
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="`latents` must have the shape"):
        pipe(GRID, 1, 3, latents=noise[..., :2])


def test_a_converted_scheduler_survives_saving(tmp_path):
    pipe = make_pipeline()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    loaded = VolumeGenerationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is EulerDiscreteScheduler
    a, b = (p(GRID, 1, 3, seeded()).volumes for p in (pipe, loaded))
    torch.testing.assert_close(a, b)


@torch.no_grad()
def test_attention_slicing_changes_the_memory_and_not_the_result():
    pipe = make_pipeline(attention=("linear", "linear"))
    linear = pipe.unet.down_levels[0].attention
    sizes = []

    def peak(slice_size) -> tuple[torch.Tensor, int]:
        sizes.clear()
        pipe.enable_attention_slicing(slice_size) if slice_size else pipe.disable_attention_slicing()
        return pipe(GRID, 1, 2, seeded()).volumes, max(sizes)

    project, attend = linear._project, linear.attend
    linear._project = lambda x, which: sizes.append(x[0, 0].numel()) or project(x, which)
    linear.attend = lambda q, k, v: sizes.append(q.shape[-1]) or attend(q, k, v)
    whole, most = peak(None)
    for slice_size, expected in (("auto", 192), ("max", 192), (50, 50)):
        sliced, size = peak(slice_size)
        torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)
        assert size == expected
    assert most == 6 * 8 * 4 == 192 and peak(None)[1] == 192
    with pytest.raises(ValueError, match="slice_size"):
        pipe.enable_attention_slicing("half")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_no_warning(dtype, caplog):
    diffusers_logger = logging.getLogger("diffusers")
    diffusers_logger.addHandler(caplog.handler)
    try:
        pipe = make_pipeline(kind=DiffusionFeaturePipeline).to(dtype)
        found = pipe(torch.rand(GRID), timestep=5, stages=(1,), generator=seeded()).features[0]
        expected = pipe.to("cpu", torch.float32).unet.dtype
    finally:
        diffusers_logger.removeHandler(caplog.handler)
    assert not caplog.records and found.dtype == expected == torch.float32

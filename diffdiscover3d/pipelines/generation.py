"""Unconditional generation of volumes with a diffusion model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.models.unet_3d import UNet3DModel, as_grid
from diffdiscover3d.pipelines.hub_support import HubPipelineMixin, register_pipeline
from diffdiscover3d.pipelines.schedulers import NoiseSchedule, check_sampling, step_arguments
from diffdiscover3d.pipelines.volumes import check_output_type, convert


@dataclass
class VolumeGenerationOutput(BaseOutput):
    """Output of [`VolumeGenerationPipeline`].

    Attributes:
        volumes: (B, 1, H, W, D) float32 in [0, 1], or B images (H, W, D) of 1 mm voxels.
    """

    volumes: torch.Tensor | np.ndarray | list


@register_pipeline
class VolumeGenerationPipeline(HubPipelineMixin, DiffusionPipeline):
    """Pipeline for unconditional volume generation with a scheduler of diffusers.

    Args:
        unet: the pretrained diffusion model.
        scheduler: of the DDPM family, with the noise schedule and prediction type of the model. To sample in another
            way, convert it: `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`.

    Raises:
        ValueError: if the scheduler does not fit.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents", "prediction")

    def __init__(self, unet: UNet3DModel, scheduler: SchedulerMixin):
        super().__init__()
        self._schedule = NoiseSchedule.of(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt, self._num_timesteps = False, 0

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback sets `pipe._interrupt = True`, as in diffusers."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        grid: int | Sequence[int] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VolumeGenerationOutput | tuple:
        """Sample volumes.

        Args:
            grid: shape of the volumes in voxels, one integer or three; default: the UNet's internal grid.
            batch_size: number of volumes.
            num_inference_steps: number of denoising steps; default: all steps of the schedule.
            generator: random generator of the noise, or a list with one for each volume; a CPU generator gives the same
                noise on every device.
            eta: of DDIM: 0 adds no noise, 1 as much as DDPM; other schedulers ignore it.
            latents: (B, 1, h, w, d) standard normal noise to start from, on the UNet's internal grid if noise is added
                there, otherwise on `grid`. The name is that of diffusers; there is no latent space.
            output_type: "pt" (a tensor), "np" (an array of the same shape) or "nifti" (a list of images).
            return_dict: return a [`VolumeGenerationOutput`]; `False`: the tuple of its entries.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each step; of the dict that
                it returns, "latents" replaces the current sample.
            callback_on_step_end_tensor_inputs: what `tensors` has: "latents", the sample after the step in [-1, 1] plus
                noise, and "prediction", the UNet's output.

        Raises:
            ValueError: if `grid` is missing and the UNet has no internal grid, an argument is out of range, or the
                scheduler does not fit.
        """
        grid = self.unet.config.sample_size if grid is None else grid
        if grid is None:
            raise ValueError("`grid` is missing and this UNet has no internal grid: give one integer or three.")
        total = len(self._schedule.alphas_cumprod)
        steps = total if num_inference_steps is None else num_inference_steps
        if not 1 <= steps <= total:
            raise ValueError(f"`num_inference_steps` must be in 1..{total}, got {steps}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be one or a list of `batch_size` {batch_size}, got {len(generator)}.")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := [k for k in callback_on_step_end_tensor_inputs if k not in self._callback_tensor_inputs]:
            known = ", ".join(self._callback_tensor_inputs)
            raise ValueError(f"`callback_on_step_end_tensor_inputs` may have {known}, got {unknown}.")
        check_output_type(output_type)
        self._schedule.check(self.scheduler)
        check_sampling(self.scheduler, steps)

        # a model with noise on its internal grid samples on that grid; the result is resized
        shape = (batch_size, self.unet.config.in_channels, *(self.unet.noise_grid or as_grid(grid)))
        latents = self._initial_noise(shape, generator, latents)
        self.scheduler.set_timesteps(steps, device=latents.device)
        latents = latents * self.scheduler.init_noise_sigma
        arguments = step_arguments(self.scheduler, generator, eta)
        self._interrupt, self._num_timesteps = False, len(self.scheduler.timesteps)
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self.interrupt:
                continue
            scaled = self.scheduler.scale_model_input(latents, t)
            prediction = self.unet(scaled.to(self.unet.dtype), t.expand(batch_size)).sample.float()
            latents = self.scheduler.step(prediction, t, latents, **arguments).prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "prediction": prediction}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, t, given) or {}).get("latents", latents)
        volumes = (resize_volume(latents, as_grid(grid)).clamp(-1, 1) + 1) / 2
        self.maybe_free_model_hooks()
        volumes = convert(volumes, output_type, [np.eye(4)] * batch_size)
        return VolumeGenerationOutput(volumes=volumes) if return_dict else (volumes,)

    def _initial_noise(self, shape: tuple[int, ...], generator, latents: torch.Tensor | None) -> torch.Tensor:
        place = self._execution_device
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
            return latents.to(place, torch.float32)
        # without a generator on the CPU, so that `torch.manual_seed` gives the same noise on every device
        where = place if generator is not None else torch.device("cpu")
        return randn_tensor(shape, generator, where, torch.float32).to(place)


def make_ddim_scheduler(scheduler: DDPMScheduler) -> DDIMScheduler:
    """Convert to DDIM with the same noise schedule and trailing spacing, which starts sampling at the last timestep."""
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")

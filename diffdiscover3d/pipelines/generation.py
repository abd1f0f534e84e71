"""Unconditional generation of volumes with a diffusion model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput

from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.models.unet_3d import UNet3DModel, as_grid
from diffdiscover3d.pipelines.hub_support import HubPipelineMixin, register_library

register_library()


@dataclass
class VolumeGenerationOutput(BaseOutput):
    """Output of [`VolumeGenerationPipeline`].

    Attributes:
        volumes: (B, 1, H, W, D) float32 in [0, 1].
    """

    volumes: torch.Tensor


class VolumeGenerationPipeline(HubPipelineMixin, DiffusionPipeline):
    """Pipeline for unconditional volume generation with DDPM (all steps) or DDIM (few steps).

    Args:
        unet: the pretrained diffusion model.
        scheduler: `DDPMScheduler` or `DDIMScheduler`; convert between them with `DDIMScheduler.from_config`.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet3DModel, scheduler: DDPMScheduler | DDIMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        grid: int | Sequence[int] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> VolumeGenerationOutput:
        """Sample volumes.

        Args:
            grid: shape of the volumes in voxels, one integer or three; default: the UNet's internal grid.
            batch_size: number of volumes.
            num_inference_steps: number of denoising steps; default: all steps of the schedule.
            generator: random generator of the noise; a CPU generator gives the same noise on every device.

        Raises:
            ValueError: if `grid` is missing and the UNet has no internal grid, or the number of steps or volumes is out
                of range.
        """
        grid = self.unet.config.sample_size if grid is None else grid
        if grid is None:
            raise ValueError("`grid` is missing and this UNet has no internal grid: give one integer or three.")
        total = self.scheduler.config.num_train_timesteps
        steps = total if num_inference_steps is None else num_inference_steps
        if not 1 <= steps <= total:
            raise ValueError(f"`num_inference_steps` must be in 1..{total}, got {steps}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")

        device = generator.device if generator is not None else torch.device("cpu")
        # a model with noise on its internal grid samples on that grid; the result is resized
        shape = (batch_size, self.unet.config.in_channels, *(self.unet.noise_grid or as_grid(grid)))
        sample = torch.randn(shape, generator=generator, device=device).to(self.device)
        self.scheduler.set_timesteps(steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            predicted = self.unet(sample.to(self.unet.dtype), t.expand(batch_size)).sample.float()
            sample = self.scheduler.step(predicted, t, sample, generator=generator).prev_sample
        return VolumeGenerationOutput(volumes=(resize_volume(sample, as_grid(grid)).clamp(-1, 1) + 1) / 2)


def make_ddim_scheduler(scheduler: DDPMScheduler) -> DDIMScheduler:
    """Convert to DDIM with the same noise schedule and trailing spacing, which starts sampling at the last timestep."""
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")

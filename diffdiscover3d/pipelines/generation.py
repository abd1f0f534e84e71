"""Sample new volumes from a diffusion model."""

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
    """Output of [`VolumeGenerationPipeline`]: `volumes`, (B, 1, H, W, D) float32 in [0, 1]."""

    volumes: torch.Tensor


class VolumeGenerationPipeline(HubPipelineMixin, DiffusionPipeline):
    """Denoise pure noise step by step into new volumes, by DDPM (all steps) or DDIM (few).

    Args:
        unet: the pretrained diffusion model.
        scheduler: `DDPMScheduler` or `DDIMScheduler`; one turns into the other by `DDIMScheduler.from_config`.
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
            grid: voxels of the volumes, one integer or three; default: the UNet's internal grid.
            batch_size: how many volumes.
            num_inference_steps: denoising steps; default: all of the schedule.
            generator: of the noise; a CPU generator gives the same noise on every device.

        Raises:
            ValueError: if no grid is given and the UNet has none, or steps or batch are out of range.
        """
        grid = self.unet.config.sample_size if grid is None else grid
        if grid is None:
            raise ValueError("this UNet takes any grid: say which with `grid`, one integer or three.")
        total = self.scheduler.config.num_train_timesteps
        steps = total if num_inference_steps is None else num_inference_steps
        if not 1 <= steps <= total:
            raise ValueError(f"`num_inference_steps` must lie in 1..{total}, got {steps}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")

        device = generator.device if generator is not None else torch.device("cpu")
        # a model trained on noise of its internal grid is given just that, and the sample is resized
        shape = (batch_size, self.unet.config.in_channels, *(self.unet.noise_grid or as_grid(grid)))
        sample = torch.randn(shape, generator=generator, device=device).to(self.device)
        self.scheduler.set_timesteps(steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            predicted = self.unet(sample.to(self.unet.dtype), t.expand(batch_size)).sample.float()
            sample = self.scheduler.step(predicted, t, sample, generator=generator).prev_sample
        return VolumeGenerationOutput(volumes=(resize_volume(sample, as_grid(grid)).clamp(-1, 1) + 1) / 2)


def make_ddim_scheduler(scheduler: DDPMScheduler) -> DDIMScheduler:
    """DDIM on the same noise schedule; few steps then start from the last timestep, where all is noise."""
    return DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")

"""Features of a pretrained diffusion model (Fig. 1 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput

from diffdiscover3d.data.formats.nifti.reading import as_volume_tensor
from diffdiscover3d.data.transforms import min_max_normalize, resize_volume
from diffdiscover3d.models.unet_3d import UNet3DModel
from diffdiscover3d.pipelines.hub_support import HubPipelineMixin, register_library

register_library()


@dataclass
class DiffusionFeatureOutput(BaseOutput):
    """Output of [`DiffusionFeaturePipeline`].

    Attributes:
        features: one (B, c, h, w, d) float32 feature map per requested decoder stage; on the voxel grid if upsampled.
        stages: the decoder stages, in the same order.
        extent: voxel grid spanned by the features with aligned corners: that of the volume, or a larger one if the
            UNet padded the volume at the far ends.
        denoised: (B, 1, H, W, D) prediction of the clean volume at this timestep, in [0, 1]; `None` if not requested.
    """

    features: tuple[torch.Tensor, ...]
    stages: tuple[int, ...]
    extent: tuple[int, int, int]
    denoised: torch.Tensor | None = None


class DiffusionFeaturePipeline(HubPipelineMixin, DiffusionPipeline):
    """Pipeline for feature extraction: adds noise to a volume (Eq. 2), runs the UNet and returns decoder features.

    Args:
        unet: the pretrained diffusion model.
        scheduler: the noise schedule of its training.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4)
        >>> pipe = DiffusionFeaturePipeline(unet, DDPMScheduler(250, prediction_type="sample"))
        >>> out = pipe(torch.rand(16, 12, 8), timestep=25, stages=(1,), generator=torch.Generator().manual_seed(0))
        >>> out.features[0].shape
        torch.Size([1, 8, 8, 6, 4])
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet3DModel, scheduler: DDPMScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        volume,
        timestep: int = 25,
        stages: Sequence[int] = (1, 2, 3),
        generator: torch.Generator | None = None,
        num_noise: int = 1,
        upsample: bool = False,
        denoised: bool = False,
        chunk_channels: int = 32,
    ) -> DiffusionFeatureOutput:
        """Extract features.

        Args:
            volume: a path or nibabel image (reoriented to RAS+), or an array or tensor of shape (H, W, D),
                (B, H, W, D) or (B, 1, H, W, D) with any intensities; each volume is min-max normalised.
            timestep: timestep t of the noise, in [0, T); the paper uses 25 of 250.
            stages: decoder stages; 1 is the coarsest.
            generator: random generator of the noise; a CPU generator gives the same noise on every device.
            num_noise: number of noise samples over which the features are averaged.
            upsample: upsample the features to the voxel grid (trilinear, aligned corners) in host memory.
            denoised: also return the prediction of the clean volume, averaged over the noise samples; requires a full
                forward pass of the UNet.
            chunk_channels: number of channels upsampled at a time.

        Raises:
            InputError: if the volume cannot be read, has no contrast, or contains NaN or Inf.
            ValueError: if the timestep, a decoder stage or the number of noise samples is out of range.
        """
        steps = self.scheduler.config.num_train_timesteps
        if not 0 <= timestep < steps:
            raise ValueError(f"`timestep` must be in 0..{steps - 1}, got {timestep}.")
        if num_noise < 1:
            raise ValueError(f"`num_noise` must be at least 1, got {num_noise}.")
        volume = min_max_normalize(as_volume_tensor(volume).to(self.device))
        shape = (*volume.shape[:2], *(self.unet.noise_grid or volume.shape[2:]))
        device = generator.device if generator is not None else torch.device("cpu")
        # one call per sample, so that a larger `num_noise` extends the same sequence
        draws = [torch.randn(shape, generator=generator, device=device) for _ in range(num_noise)]
        noise = torch.stack(draws).to(self.device)
        output = self.extract(volume, noise, timestep, stages, denoised)
        if upsample:
            grid = tuple(volume.shape[2:])
            features = tuple(upsample_features(f, grid, output.extent, chunk_channels) for f in output.features)
            output = DiffusionFeatureOutput(features, output.stages, grid, output.denoised)
        return output

    @torch.no_grad()
    def extract(
        self,
        volume: torch.Tensor,
        noise: torch.Tensor,
        timestep: int,
        stages: Sequence[int],
        denoised: bool = False,
    ) -> DiffusionFeatureOutput:
        """Extract features of normalised volumes with given noise.

        Args:
            volume: (B, 1, H, W, D) volumes in [0, 1].
            noise: (num_noise, B, 1, h, w, d) standard normal noise on `unet.noise_grid` or, if that is `None`, on the
                voxel grid.
            timestep, stages, denoised: as for calling the pipeline.
        """
        grid = tuple(volume.shape[2:])
        with torch.autocast(volume.device.type, enabled=False):
            clean = 2 * volume.float() - 1
            if self.unet.noise_grid is not None:
                clean = resize_volume(clean, self.unet.noise_grid)
        steps = torch.full((volume.shape[0],), timestep, device=volume.device)
        sums, denoised_sum, extent = None, 0, grid
        for draw in noise:
            noisy = self.scheduler.add_noise(clean, draw, steps)  # in float32, because bfloat16 rounds the noise level
            out = self.unet(noisy.to(self.unet.dtype), steps, stages=stages, return_sample=denoised)
            features = [f.float() for f in out.features]
            sums = features if sums is None else [a + b for a, b in zip(sums, features, strict=True)]
            if denoised:
                denoised_sum = denoised_sum + out.sample.float()
            if self.unet.noise_grid is None:
                extent = out.extent
        features = tuple(f / len(noise) for f in sums)
        prediction = None
        if denoised:
            prediction = ((denoised_sum / len(noise)).clamp(-1, 1) + 1) / 2
            prediction = F.interpolate(prediction, size=grid, mode="trilinear", align_corners=False)
        return DiffusionFeatureOutput(features, tuple(stages), extent, prediction)


def make_scheduler(num_train_timesteps: int, prediction_type: str = "sample") -> DDPMScheduler:
    """The noise schedule of the paper: cosine, by default with prediction of the clean volume."""
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )


def upsample_features(
    features: torch.Tensor, grid: Sequence[int], extent: Sequence[int] | None = None, chunk_channels: int = 32
) -> torch.Tensor:
    """Upsample (B, C, h, w, d) features that span `extent` to the voxel grid `grid`, with aligned corners.

    Returns:
        (B, C, *grid) float32 in host memory, computed `chunk_channels` channels at a time.
    """
    extent = tuple(extent or grid)
    out = torch.empty(*features.shape[:2], *grid, dtype=torch.float32)
    for first in range(0, features.shape[1], chunk_channels):
        chunk = features[:, first : first + chunk_channels].float()
        chunk = F.interpolate(chunk, size=extent, mode="trilinear", align_corners=True)
        out[:, first : first + chunk_channels] = chunk[..., : grid[0], : grid[1], : grid[2]].cpu()
    return out

"""Features of a pretrained diffusion model (Fig. 1 of the paper)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from diffdiscover3d.data.transforms import min_max_normalize, resize_volume
from diffdiscover3d.models.cuda_graphs import GraphedCalls
from diffdiscover3d.models.unet_3d import UNet3DModel, UNet3DOutput
from diffdiscover3d.pipelines.hub_support import HubPipelineMixin, register_pipeline
from diffdiscover3d.pipelines.schedulers import NoiseSchedule
from diffdiscover3d.pipelines.volumes import check_output_type, convert, feature_affine, read_volumes


@dataclass
class DiffusionFeatureOutput(BaseOutput):
    """Output of [`DiffusionFeaturePipeline`].

    Attributes:
        features: for each requested decoder stage the (B, c, h, w, d) float32 feature maps, on the voxel grid if
            upsampled; with `output_type="nifti"` a list of B images (h, w, d, c) aligned with the scans.
        stages: the decoder stages, in the same order.
        extent: voxel grid spanned by the features with aligned corners: that of the volume, or a larger one if the
            UNet padded the volume at the far ends.
        denoised: (B, 1, H, W, D) prediction of the clean volume at this timestep, in [0, 1]; `None` if not requested.
            As images (H, W, D).

    For a list of volumes of different shapes, each feature map, `extent` and `denoised` is a list with one entry a
    volume (tensors and arrays with B = 1).
    """

    features: tuple
    stages: tuple[int, ...]
    extent: tuple[int, int, int] | list[tuple[int, int, int]]
    denoised: torch.Tensor | np.ndarray | list | None = None


@register_pipeline
class DiffusionFeaturePipeline(HubPipelineMixin, DiffusionPipeline):
    """Pipeline for feature extraction: adds noise to a volume (Eq. 2), runs the UNet and returns decoder features.

    Args:
        unet: the pretrained diffusion model.
        scheduler: the noise schedule of its training, and what the model predicts (`prediction_type`). A scheduler
            that replaces it later must have the same schedule; any of the DDPM family fits, see
            `pipelines/schedulers.py`.

    Raises:
        ValueError: if the scheduler does not fit.

    Example:
        >>> import torch
        >>> from diffdiscover3d.pipelines.diffusion_feature import make_scheduler
        >>> unet = UNet3DModel(width=8, channel_multipliers=(1, 2), attention=(None, None), norm_groups=4)
        >>> pipe = DiffusionFeaturePipeline(unet, make_scheduler(250))
        >>> out = pipe(torch.rand(16, 12, 8), timestep=25, stages=(1,), generator=torch.Generator().manual_seed(0))
        >>> out.features[0].shape
        torch.Size([1, 8, 8, 6, 4])
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet3DModel, scheduler: SchedulerMixin):
        super().__init__()
        self._schedule = NoiseSchedule.of(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._graphs: GraphedCalls | None = None

    def enable_cuda_graphs(self) -> None:
        """Replay the UNet as a CUDA graph from the second volume of a shape on.

        The host then launches one graph instead of hundreds of kernels for each volume. Graphs keep the memory of a
        forward pass for each shape. Call it again after a change of how the UNet computes, as by
        `enable_attention_slicing`. Elsewhere than on a CUDA GPU it changes nothing.
        """
        self._graphs = GraphedCalls()

    def disable_cuda_graphs(self) -> None:
        """Undo [`enable_cuda_graphs`]."""
        self._graphs = None

    def _run_unet(self, *tensors: torch.Tensor, **options) -> UNet3DOutput:
        return self.unet(*tensors, **options) if self._graphs is None else self._graphs(self.unet, *tensors, **options)

    @torch.no_grad()
    def __call__(
        self,
        volume,
        timestep: int = 25,
        stages: Sequence[int] = (1, 2, 3),
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_noise: int = 1,
        upsample: bool = False,
        denoised: bool = False,
        chunk_channels: int = 32,
        output_type: str = "pt",
        return_dict: bool = True,
    ) -> DiffusionFeatureOutput | tuple:
        """Extract features.

        Args:
            volume: a path of any format or nibabel image (reoriented to RAS+), an array or tensor of shape (H, W, D),
                (B, H, W, D) or (B, 1, H, W, D) with any intensities, or a list of these. Each volume is min-max
                normalised. Volumes of equal shape are one batch; those of a list with different shapes are computed
                one after the other.
            timestep: timestep t of the noise, in [0, T); the paper uses 25 of 250.
            stages: decoder stages; 1 is the coarsest.
            generator: random generator of the noise, or a list with one for each volume, whose features are then those
                of a call with this volume alone; a CPU generator gives the same noise on every device.
            num_noise: number of noise samples over which the features are averaged.
            upsample: upsample the features to the voxel grid (trilinear, aligned corners) in host memory.
            denoised: also return the prediction of the clean volume, averaged over the noise samples; requires a full
                forward pass of the UNet.
            chunk_channels: number of channels upsampled at a time.
            output_type: "pt" (tensors), "np" (arrays of the same shape) or "nifti" (images with the scan's affine).
            return_dict: return a [`DiffusionFeatureOutput`]; `False`: the tuple of its entries that are not `None`.

        Raises:
            InputError: if a volume cannot be read, has no contrast, or contains NaN or Inf.
            ValueError: if the timestep, a decoder stage, the output type, the number of noise samples or of generators
                is out of range, or the scheduler has another schedule than the model was trained with.
        """
        self._schedule.check(self.scheduler)
        check_output_type(output_type)
        steps = len(self._schedule.alphas_cumprod)
        if not 0 <= timestep < steps:
            raise ValueError(f"`timestep` must be in 0..{steps - 1}, got {timestep}.")
        if num_noise < 1:
            raise ValueError(f"`num_noise` must be at least 1, got {num_noise}.")
        volumes, affines = read_volumes(volume)
        if isinstance(generator, list) and len(generator) != len(volumes):
            raise ValueError(
                f"`generator` must be one or a list of {len(volumes)}, one a volume; got {len(generator)}."
            )
        one_batch = len({v.shape for v in volumes}) == 1
        batches = [slice(0, len(volumes))] if one_batch else [slice(i, i + 1) for i in range(len(volumes))]
        outputs = []
        for batch in batches:
            own = generator[batch] if isinstance(generator, list) else generator
            found = self._features(torch.cat(volumes[batch]), own, num_noise, timestep, stages, denoised)
            if upsample:
                grid = tuple(volumes[batch.start].shape[2:])
                features = tuple(upsample_features(f, grid, found.extent, chunk_channels) for f in found.features)
                found = DiffusionFeatureOutput(features, found.stages, grid, found.denoised)
            outputs.append(_as_type(found, output_type, affines[batch]))
        self.maybe_free_model_hooks()
        output = outputs[0] if one_batch else _joined(outputs, output_type)
        return output if return_dict else output.to_tuple()

    def _features(self, volume: torch.Tensor, generator, num_noise: int, timestep: int, stages, denoised: bool):
        """[`extract`] of raw (B, 1, H, W, D) volumes, with noise of the generator, or generators."""
        place = self._execution_device
        volume = min_max_normalize(volume.to(place))
        shape = (*volume.shape[:2], *(self.unet.noise_grid or volume.shape[2:]))
        # one call per sample, so that a larger `num_noise` extends the same sequence; without a generator on the CPU,
        # so that `torch.manual_seed` gives the same noise on every device
        where = place if generator is not None else torch.device("cpu")
        noise = torch.stack([randn_tensor(shape, generator, where, torch.float32) for _ in range(num_noise)]).to(place)
        return self.extract(volume, noise, timestep, stages, denoised)

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
        # noise is added in float32, because bfloat16 rounds the noise level
        with torch.autocast(volume.device.type, enabled=False):
            clean = 2 * volume.float() - 1
            if self.unet.noise_grid is not None:
                clean = resize_volume(clean, self.unet.noise_grid)
        steps = torch.full((volume.shape[0],), timestep, device=volume.device)
        sums, denoised_sum, extent = None, 0, grid
        for draw in noise:
            noisy = self._schedule.add_noise(clean, draw, timestep)
            out = self._run_unet(noisy.to(self.unet.dtype), steps, stages=tuple(stages), return_sample=denoised)
            features = [f.float() for f in out.features]
            sums = features if sums is None else [a + b for a, b in zip(sums, features, strict=True)]
            if denoised:
                denoised_sum = denoised_sum + self._schedule.predict_clean(out.sample.float(), noisy, timestep)
            if self.unet.noise_grid is None:
                extent = out.extent
        features = tuple(f / len(noise) for f in sums)
        prediction = None
        if denoised:
            prediction = ((denoised_sum / len(noise)).clamp(-1, 1) + 1) / 2
            prediction = F.interpolate(prediction, size=grid, mode="trilinear", align_corners=False)
        return DiffusionFeatureOutput(features, tuple(stages), extent, prediction)


def _as_type(output: DiffusionFeatureOutput, output_type: str, affines: Sequence) -> DiffusionFeatureOutput:
    features = tuple(
        convert(f, output_type, [feature_affine(a, f.shape[2:], output.extent) for a in affines])
        for f in output.features
    )
    denoised = None if output.denoised is None else convert(output.denoised, output_type, affines)
    return DiffusionFeatureOutput(features, output.stages, output.extent, denoised)


def _joined(outputs: list[DiffusionFeatureOutput], output_type: str) -> DiffusionFeatureOutput:
    """Outputs of single volumes as one, with lists of one entry a volume."""

    def listed(values: Sequence) -> list:
        return [image for images in values for image in images] if output_type == "nifti" else list(values)

    features = tuple(listed(values) for values in zip(*(o.features for o in outputs), strict=True))
    denoised = None if outputs[0].denoised is None else listed([o.denoised for o in outputs])
    return DiffusionFeatureOutput(features, outputs[0].stages, [o.extent for o in outputs], denoised)


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

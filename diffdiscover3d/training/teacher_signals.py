"""Outputs of the frozen teacher and of the parent network for structure discovery, with an optional cache."""

from dataclasses import dataclass

import numpy as np
import torch

from diffdiscover3d.data.transforms import flip
from diffdiscover3d.models.mixed_precision import free_memory
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.training.config import DiscoveryConfig

_MEMORY_SHARE = 0.25  # of the device's free memory, for outputs with fixed noise


@dataclass
class TeacherOutput:
    """Outputs of teacher and parent for a batch of volumes.

    Attributes:
        features: one (B, c, h, w, d) feature map per decoder stage; empty if the feature consistency is disabled.
        extent: voxel grid spanned by the features, as in [`DiffusionFeatureOutput`].
        denoised: (B, 1, H, W, D) clean prediction of the teacher in [0, 1]; `None` if its consistency is disabled.
        parent_labels: (B, 1, H, W, D) part labels of the parent; `None` without a parent.
    """

    features: tuple[torch.Tensor, ...]
    extent: tuple[int, int, int]
    denoised: torch.Tensor | None
    parent_labels: torch.Tensor | None


class TeacherSignals:
    """Computes the outputs of teacher and parent at every step or, with `teacher_noise="fixed"`, once per volume.

    With fixed noise, the noise of a volume is a function of the seed and the index of the volume. The outputs are
    cached at the coarse resolution of the features, on the device while there is room and then in host memory, and
    flipped together with the volume. This is an approximation, because the teacher is not exactly equivariant to flips.
    """

    def __init__(self, config: DiscoveryConfig, teacher: DiffusionFeaturePipeline, model: StructureDiscoveryModel):
        self.config, self.teacher, self.model = config, teacher, model
        self.fixed = config.teacher_noise == "fixed"
        self._cache: dict[int, TeacherOutput] = {}
        self._device_bytes: float | None = None  # that may still be kept on the device

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timesteps at which the teacher is evaluated."""
        config = self.config
        features = (config.timestep,) if config.lambda_feature > 0 else ()
        denoised = config.denoised_timesteps if config.lambda_denoised > 0 else ()
        return tuple(dict.fromkeys((*features, *denoised)))

    def noise_shape(self, grid: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of one volume's noise: (timesteps * num_noise, 1, *grid)."""
        return len(self.timesteps) * self.config.num_noise, 1, *grid

    def draw(self, grid: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
        """Sample the noise of one volume, of `noise_shape`."""
        return torch.randn(self.noise_shape(grid), generator=generator)

    def __call__(self, batch: dict[str, torch.Tensor]) -> TeacherOutput:
        """The outputs for a batch with `volume` and either `noise` or, with fixed noise, `index` and `flips`."""
        if not self.fixed:
            return self._compute(batch["volume"], batch["noise"])
        outputs = []
        for volume, index, flips in zip(batch["volume"], batch["index"].tolist(), batch["flips"].cpu(), strict=True):
            if index not in self._cache:
                self._cache[index] = self._compute_fixed(flip(volume[None], flips), index)

            def fetch(x, flips=flips, device=volume.device):
                return flip(x.to(device, non_blocking=True), flips).float()

            outputs.append(_map(fetch, self._cache[index]))
        return _join(outputs)

    def fixed_noise(self, index: int, grid: tuple[int, int, int]) -> torch.Tensor:
        """The fixed noise of a volume, a function of the seed and the index; shaped as by `draw`."""
        key = np.random.SeedSequence([self.config.seed, index, 0x7EAC]).generate_state(1, np.uint64)[0]
        return self.draw(grid, torch.Generator().manual_seed(int(key) >> 1))

    def _compute_fixed(self, volume: torch.Tensor, index: int) -> TeacherOutput:
        noise = self.fixed_noise(index, self.teacher.unet.noise_grid or tuple(volume.shape[2:]))
        found = self._compute(volume, noise[None].to(volume.device))
        if self.config.flips and tuple(found.extent) != tuple(volume.shape[2:]):
            raise ValueError(
                f"`teacher_noise` is 'fixed' and the teacher pads volumes of {tuple(volume.shape[2:])} voxels to "
                f"{tuple(found.extent)}, so that features cannot be flipped; use --teacher-noise fresh or --no-flips."
            )
        return _map(self._keep, found)

    def _keep(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in half precision, on its device while all that is kept takes at most a quarter of the free memory."""
        x = x.half()
        if not x.is_cuda:
            return x
        if self._device_bytes is None:
            self._device_bytes = _MEMORY_SHARE * free_memory(x.device)
        if x.nbytes <= self._device_bytes:
            self._device_bytes -= x.nbytes
            return x
        return x.cpu().pin_memory()  # pinned memory allows asynchronous copies to the GPU

    @torch.no_grad()
    def _compute(self, volume: torch.Tensor, noise: torch.Tensor) -> TeacherOutput:
        config, extent = self.config, tuple(volume.shape[2:])
        features, denoised = (), []
        # without timesteps, `split` would still return one empty chunk
        chunks = noise.movedim(1, 0).split(config.num_noise) if self.timesteps else ()
        for timestep, draws in zip(self.timesteps, chunks, strict=True):
            needs_features = config.lambda_feature > 0 and timestep == config.timestep
            needs_denoised = config.lambda_denoised > 0 and timestep in config.denoised_timesteps
            stages = config.stages if needs_features else ()
            found = self.teacher.extract(volume, draws, timestep, stages, needs_denoised)
            if needs_features:
                features, extent = found.features, found.extent
            if needs_denoised:
                denoised.append(found.denoised)
        mean = torch.stack(denoised).mean(dim=0) if denoised else None
        return TeacherOutput(features, extent, mean, self.model.label_parents(volume))


def _map(function, output: TeacherOutput) -> TeacherOutput:
    def applied(x):
        return None if x is None else function(x)

    features = tuple(function(f) for f in output.features)
    return TeacherOutput(features, output.extent, applied(output.denoised), applied(output.parent_labels))


def _join(outputs: list[TeacherOutput]) -> TeacherOutput:
    def joined(tensors):
        return None if tensors[0] is None else torch.cat(tensors)

    features = tuple(torch.cat(maps) for maps in zip(*(o.features for o in outputs), strict=True))
    denoised, parents = joined([o.denoised for o in outputs]), joined([o.parent_labels for o in outputs])
    return TeacherOutput(features, outputs[0].extent, denoised, parents)

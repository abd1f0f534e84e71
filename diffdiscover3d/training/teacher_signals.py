"""What the frozen teacher tells the discovery training about a volume."""

from dataclasses import dataclass

import numpy as np
import torch

from diffdiscover3d.data.transforms import flip
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.training.config import DiscoveryConfig


@dataclass
class Signals:
    """For a batch of volumes:

    Attributes:
        features: one (B, c, h, w, d) map per stage; none if the feature consistency is off.
        extent: the grid of voxels they span, as in [`DiffusionFeatureOutput`].
        denoised: (B, 1, H, W, D) the teacher's clean prediction in [0, 1]; `None` if its consistency is off.
        parent_labels: (B, 1, H, W, D) the parts to divide; `None` without a parent.
    """

    features: tuple[torch.Tensor, ...]
    extent: tuple[int, int, int]
    denoised: torch.Tensor | None
    parent_labels: torch.Tensor | None


class TeacherSignals:
    """Asks teacher and parent at every step, or with `teacher_noise="fixed"` once for each volume.

    A fixed volume's noise is a function of the seed and its index. What it gave is kept in host memory, at the coarse
    size of the features, and mirrored with the volume: a teacher is nearly, not exactly, the same under mirroring.
    """

    def __init__(self, config: DiscoveryConfig, teacher: DiffusionFeaturePipeline, model: StructureDiscoveryModel):
        self.config, self.teacher, self.model = config, teacher, model
        self.fixed = config.teacher_noise == "fixed"
        self._kept: dict[int, Signals] = {}

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The noise steps at which the teacher is asked."""
        config = self.config
        features = (config.timestep,) if config.lambda_feature > 0 else ()
        denoised = config.denoised_timesteps if config.lambda_denoised > 0 else ()
        return tuple(dict.fromkeys((*features, *denoised)))

    def noise_shape(self, grid: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of one volume's noise: (timesteps * draws, 1, *grid)."""
        return len(self.timesteps) * self.config.num_noise, 1, *grid

    def draw(self, grid: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
        """The noise of one volume, of `noise_shape`."""
        return torch.randn(self.noise_shape(grid), generator=generator)

    def __call__(self, batch: dict[str, torch.Tensor]) -> Signals:
        """The signals of a batch of `volume`, and `noise` or, where that is fixed, `index` and `flips`."""
        if not self.fixed:
            return self._ask(batch["volume"], batch["noise"])
        signals = []
        for volume, index, flips in zip(batch["volume"], batch["index"].tolist(), batch["flips"].cpu(), strict=True):
            if index not in self._kept:
                self._kept[index] = self._ask_once(flip(volume[None], flips), index)

            def fetch(x, flips=flips, device=volume.device):
                return flip(x.to(device, non_blocking=True), flips).float()

            signals.append(_map(fetch, self._kept[index]))
        return _join(signals)

    def fixed_noise(self, index: int, grid: tuple[int, int, int]) -> torch.Tensor:
        """The noise of a volume that is asked about once, a function of the seed and its index; as of `draw`."""
        key = np.random.SeedSequence([self.config.seed, index, 0x7EAC]).generate_state(1, np.uint64)[0]
        return self.draw(grid, torch.Generator().manual_seed(int(key) >> 1))

    def _ask_once(self, volume: torch.Tensor, index: int) -> Signals:
        noise = self.fixed_noise(index, self.teacher.unet.noise_grid or tuple(volume.shape[2:]))
        found = self._ask(volume, noise[None].to(volume.device))
        if self.config.flips and tuple(found.extent) != tuple(volume.shape[2:]):
            raise ValueError(
                f"`teacher_noise` is 'fixed' and the teacher pads volumes of {tuple(volume.shape[2:])} voxels to "
                f"{tuple(found.extent)}, so that features cannot be mirrored; use --teacher-noise fresh or --no-flips."
            )
        # pinned, so that a GPU can fetch them while it works
        return _map(lambda x: x.to("cpu", torch.float16).pin_memory() if x.is_cuda else x.half(), found)

    @torch.no_grad()
    def _ask(self, volume: torch.Tensor, noise: torch.Tensor) -> Signals:
        config, extent = self.config, tuple(volume.shape[2:])
        features, denoised = (), []
        # without either consistency there are no timesteps, and splitting no noise would still give one empty chunk
        chunks = noise.movedim(1, 0).split(config.num_noise) if self.timesteps else ()
        for timestep, draws in zip(self.timesteps, chunks, strict=True):
            wants_features = config.lambda_feature > 0 and timestep == config.timestep
            wants_denoised = config.lambda_denoised > 0 and timestep in config.denoised_timesteps
            stages = config.stages if wants_features else ()
            found = self.teacher.extract(volume, draws, timestep, stages, wants_denoised)
            if wants_features:
                features, extent = found.features, found.extent
            if wants_denoised:
                denoised.append(found.denoised)
        mean = torch.stack(denoised).mean(dim=0) if denoised else None
        return Signals(features, extent, mean, self.model.label_parents(volume))


def _map(function, signals: Signals) -> Signals:
    def applied(x):
        return None if x is None else function(x)

    features = tuple(function(f) for f in signals.features)
    return Signals(features, signals.extent, applied(signals.denoised), applied(signals.parent_labels))


def _join(signals: list[Signals]) -> Signals:
    def joined(tensors):
        return None if tensors[0] is None else torch.cat(tensors)

    features = tuple(torch.cat(maps) for maps in zip(*(s.features for s in signals), strict=True))
    denoised, parents = joined([s.denoised for s in signals]), joined([s.parent_labels for s in signals])
    return Signals(features, signals[0].extent, denoised, parents)

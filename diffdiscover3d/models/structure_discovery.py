"""The segmentation network f of the paper: a volume in, K soft parts out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from diffdiscover3d.data.nifti import as_volume_tensor
from diffdiscover3d.data.transforms import min_max_normalize, pad_to_multiple
from diffdiscover3d.models.loading import StrictLoadingMixin


@dataclass
class StructureDiscoveryOutput(BaseOutput):
    """Output of [`StructureDiscoveryModel`]: `logits`, (B, K, H, W, D); their softmax over K are the soft parts."""

    logits: torch.Tensor


@dataclass
class Segmentation(BaseOutput):
    """Output of [`StructureDiscoveryModel.segment`].

    Attributes:
        labels: (B, H, W, D) uint8 (int32 past 256 parts), the most probable part of every voxel.
        probabilities: (B, K, H, W, D) float32, summing to 1 over K.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor


class StructureDiscoveryModel(StrictLoadingMixin, ModelMixin, ConfigMixin):
    """3D U-Net that divides a volume into K parts, largest first.

    Args:
        num_parts: K.
        channels, strides: of the MONAI U-Net, as the authors chose them.
        dropout: probability.
        norm: "batch" (the authors' choice) or "instance".
        window_size: longest side of a volume that is segmented at once; beyond, a window of this size slides over it.

    Raises:
        ValueError: if there are fewer than two parts, or strides do not fit channels.
    """

    @register_to_config
    def __init__(
        self,
        num_parts: int = 2,
        channels: Sequence[int] = (8, 16, 16, 32, 32, 64, 64),
        strides: Sequence[int] = (1, 2, 1, 2, 1, 2),
        dropout: float = 0.2,
        norm: str = "batch",
        window_size: int = 256,
    ):
        super().__init__()
        if num_parts < 2:
            raise ValueError(f"`num_parts` must be at least 2, got {num_parts}.")
        if len(strides) != len(channels) - 1:
            raise ValueError(f"`strides` must have {len(channels) - 1} entries, one less than `channels`.")
        from monai.networks.nets import UNet  # several seconds: only when a network is made

        self.stride = int(torch.tensor(list(strides)).prod())
        self.network = UNet(3, 1, num_parts, tuple(channels), tuple(strides), dropout=dropout, norm=norm)
        self.register_buffer("part_order", torch.arange(num_parts))

    def forward(self, volume: torch.Tensor) -> StructureDiscoveryOutput:
        """Logits of the parts.

        Args:
            volume: (B, 1, H, W, D), any grid and any intensities: each volume is min-max normalised.

        Raises:
            InputError: if a volume has no contrast, or holds NaN or Inf.
        """
        if volume.ndim != 5 or volume.shape[1] != 1:
            raise ValueError(f"`volume` must be (batch, 1, H, W, D), got shape {tuple(volume.shape)}.")
        return StructureDiscoveryOutput(logits=self._logits(min_max_normalize(volume)))

    @torch.no_grad()
    def segment(self, volume, progress: bool = False) -> Segmentation:
        """Divide volumes of any size into parts.

        Args:
            volume: an array or tensor of shape (H, W, D), (B, H, W, D) or (B, 1, H, W, D), any intensities; or
                whatever else [`as_volume_tensor`] takes.
            progress: show a bar while a window slides.

        Raises:
            InputError: if a volume has no contrast, or holds NaN or Inf.
        """
        volume = as_volume_tensor(volume)
        was_training = self.training
        self.eval()
        normalized = min_max_normalize(volume.to(self.device))
        probabilities = self._probabilities(normalized, progress)
        self.train(was_training)
        dtype = torch.uint8 if self.config.num_parts <= 256 else torch.int32
        return Segmentation(labels=probabilities.argmax(dim=1).to(dtype), probabilities=probabilities)

    def order_parts(self, sizes: torch.Tensor) -> None:
        """Renumber the parts, largest first.

        Args:
            sizes: (K,) mean size of each part, in the present order.
        """
        order = torch.argsort(sizes.to(self.part_order.device), descending=True, stable=True)
        self.part_order.copy_(self.part_order[order])

    def _logits(self, normalized: torch.Tensor) -> torch.Tensor:
        h, w, d = normalized.shape[2:]
        logits = self.network(pad_to_multiple(normalized, self.stride))
        return logits[:, self.part_order, :h, :w, :d]

    def _probabilities(self, normalized: torch.Tensor, progress: bool) -> torch.Tensor:
        window = self.config.window_size
        if max(normalized.shape[2:]) <= window:
            return self._logits(normalized).float().softmax(dim=1)
        from monai.inferers import sliding_window_inference

        return sliding_window_inference(
            normalized,
            roi_size=tuple(min(window, n) for n in normalized.shape[2:]),
            sw_batch_size=1,
            predictor=lambda x: self._logits(x).float().softmax(dim=1),
            overlap=0.25,
            mode="gaussian",
            progress=progress,
        )

"""3D U-Net trained from sparse labels (Çiçek et al., MICCAI 2016)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.fitting import Schedule
from diffdiscover3d.baselines.supervision import HIDDEN, best_numbering_loss, class_weights, sparse_cross_entropy
from diffdiscover3d.data.transforms import pad_to_multiple
from diffdiscover3d.models.cpu_kernels import precise_if_small


@dataclass(frozen=True)
class CicekConfig:
    """Hyper-parameters of [`Cicek`].

    Attributes:
        channels: of the resolutions, finest first; each is half as fine as the one before.
        crop: side of the cubes cut out for training; a multiple of the coarsest voxel.
        batch_size: cubes in a batch.
        steps, learning_rate: of Adam, its rate falling to zero.
        bf16: train under bfloat16 autocast.
        max_gamma: intensities are raised to a power between 1 / max_gamma and max_gamma.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    crop: int = 128
    batch_size: int = 1
    steps: int = 70_000
    learning_rate: float = 1e-3
    bf16: bool = False
    max_gamma: float = 1.5


def make_unet(channels: Sequence[int], inputs: int, outputs: int) -> nn.Module:
    """A 3D U-Net with two convolutions, each with batch normalisation, at every resolution."""
    from monai.networks.nets import DynUNet

    levels = len(channels)
    return DynUNet(
        spatial_dims=3,
        in_channels=inputs,
        out_channels=outputs,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=list(channels),
        norm_name=("batch", {"affine": True}),
        act_name=("relu", {"inplace": True}),
    )


class Cicek(TrainedBaseline):
    """A U-Net trained on the voxels whose label is given; all others have weight 0 in the loss.

    Cubes are mirrored and turned at random and their intensities raised to a random power.
    """

    name = "Çiçek et al."
    presets = {  # noqa: RUF012
        "paper": CicekConfig(),
        "small": CicekConfig(
            channels=(8, 16, 32, 64), crop=48, batch_size=2, steps=4_000, learning_rate=3e-3, bf16=True
        ),
    }

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]; labels are those of the number of parts."""
        c = self.config
        network = self.place_network(self.seeded(lambda: make_unet(c.channels, 1, self.num_parts)))
        weights = class_weights(volumes, self.num_parts).to(self.device)
        stride = 2 ** (len(c.channels) - 1)

        def loss(_) -> torch.Tensor:
            x, labels = (t.to(self.device) for t in draw_labelled(volumes, c.batch_size, c.crop, c.max_gamma))
            with precise_if_small(x, stride):
                logits = network(x)
            return best_numbering_loss(lambda y: sparse_cross_entropy(logits, y, weights), labels, self.num_parts)

        schedule = Schedule(c.steps, c.learning_rate, decay="cosine", bf16=c.bf16)
        settings = {"class_weights": [round(w, 6) for w in weights.tolist()]}
        self.train(network, loss, schedule, place(folder, f"cicek-{self.num_parts}"), settings)
        self.network = network

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        return label_in_windows(self.network, volume, self.config.crop, self.device)


@torch.no_grad()
def label_volume(network: nn.Module, volume: torch.Tensor, stride: int, device: torch.device) -> np.ndarray:
    """The most probable part of every voxel of a (1, H, W, D) volume, padded to a multiple of the stride."""
    h, w, d = volume.shape[1:]
    padded = pad_to_multiple(volume[None].to(device), stride)
    if min(padded.shape[2:]) < 2 * stride:
        padded = pad_to_multiple(padded, 2 * stride)
    logits = network(padded)[0, :, :h, :w, :d]
    return logits.argmax(dim=0).cpu().numpy().astype(np.uint8)


@torch.no_grad()
def label_in_windows(network: nn.Module, volume: torch.Tensor, crop: int, device: torch.device) -> np.ndarray:
    """The most probable part of every voxel of a (1, H, W, D) volume, for a network that is trained on cubes.

    Logits are averaged over overlapping cubes of the size of the training's. Such a network must not see a padded
    volume: the positions of zeros relative to the cell are unlike those in training.

    Returns:
        (H, W, D) uint8.
    """
    from monai.inferers import sliding_window_inference

    h, w, d = volume.shape[1:]
    x, _ = pad_far(volume, torch.zeros(h, w, d), crop)
    logits = sliding_window_inference(x[None].to(device), crop, 4, network, overlap=0.5, mode="gaussian")
    return logits[0, :, :h, :w, :d].argmax(dim=0).cpu().numpy().astype(np.uint8)


def draw_labelled(
    volumes: Sequence[dict], count: int, crop: int, max_gamma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random cubes (count, 1, c, c, c) and their labels (count, c, c, c), changed at random; from the global generator.

    c is `crop`. A smaller volume is padded at the far ends, by zeros and by voxels whose label is not given.
    """
    cubes, labels = [], []
    for index in torch.randint(len(volumes), (count,)).tolist():
        item = volumes[index]
        x, y = cut(item["volume"], item["labels"], crop)
        axes = [axis for axis in (0, 1, 2) if torch.rand(()) < 0.5]
        x, y = x.flip([axis + 1 for axis in axes]), y.flip(axes)
        order = torch.randperm(3).tolist()
        x, y = x.permute(0, *[axis + 1 for axis in order]), y.permute(order)
        gamma = max_gamma ** (2 * torch.rand(()) - 1)
        cubes.append(x**gamma)
        labels.append(y)
    return torch.stack(cubes), torch.stack(labels)


def cut(volume: torch.Tensor, labels: torch.Tensor, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random cube of a (1, H, W, D) volume and of its (H, W, D) labels, from the global generator."""
    volume, labels = pad_far(volume, labels, crop)
    corner = [int(torch.randint(n - crop + 1, ())) for n in labels.shape]
    window = tuple(slice(start, start + crop) for start in corner)
    return volume[(slice(None), *window)], labels[window]


def pad_far(volume: torch.Tensor, labels: torch.Tensor, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad a volume by zeros and its labels by [`HIDDEN`] at the far ends to at least a cube."""
    missing = [max(0, crop - n) for n in labels.shape]
    far = [v for n in missing[::-1] for v in (0, n)]
    return torch.nn.functional.pad(volume, far), torch.nn.functional.pad(labels, far, value=HIDDEN)

"""Invariant information clustering of slices (Ji et al., ICCV 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.fitting import Schedule


@dataclass(frozen=True)
class IICConfig:
    """Hyper-parameters of [`IIC`].

    Attributes:
        channels: of the 3² convolutions; `None` is a 2² max pooling.
        dilations: of the convolutions.
        max_shift: largest displacement of a pair, in pixels along each axis.
        over_clustering: parts of the second head, times K.
        heads_alternate: steps for which one head is trained before the other.
        batch_size: slices in a batch.
        steps, learning_rate: of Adam.
        jitter: largest relative change of brightness and contrast of a pair.
    """

    channels: tuple[int | None, ...] = (64, 128, None, 256, 256, 512, 512)
    dilations: tuple[int, ...] = (1, 1, 1, 1, 2, 2)
    max_shift: int = 10
    over_clustering: int = 5
    heads_alternate: int = 100
    batch_size: int = 120
    steps: int = 50_000
    learning_rate: float = 1e-4
    jitter: float = 0.4


def shifted_mutual_information(first: torch.Tensor, second: torch.Tensor, max_shift: int) -> torch.Tensor:
    """Mutual information of two soft segmentations, averaged over all displacements between them.

    For each displacement (dy, dx) in [-max_shift, max_shift]² the joint distribution of the parts of pixels (y, x) and
    (y + dy, x + dx) is taken over all pixels of the batch that have such a partner, and made symmetric.

    Args:
        first, second: (B, K, H, W), summing to 1 over K.

    Returns:
        A scalar in [0, log K] nats.
    """
    k, (h, w) = first.shape[1], first.shape[2:]
    # the sums over pixels are correlations, of which the Fourier transform is a product
    size = (h + max_shift, w + max_shift)
    one, other = (torch.fft.rfft2(x.float(), s=size) for x in (first, second))
    joint = torch.fft.irfft2(torch.einsum("bkyx,blyx->klyx", one.conj(), other), s=size)
    shifts = torch.arange(-max_shift, max_shift + 1, device=first.device)
    joint = joint[:, :, shifts % size[0]][:, :, :, shifts % size[1]].flatten(2).permute(2, 0, 1)
    joint = joint.clamp(min=0)  # rounding
    joint = joint / joint.sum(dim=(1, 2), keepdim=True)
    joint = ((joint + joint.transpose(1, 2)) / 2).clamp(min=torch.finfo(joint.dtype).eps)
    rows = joint.sum(dim=2, keepdim=True).expand(-1, k, k)
    columns = joint.sum(dim=1, keepdim=True).expand(-1, k, k)
    return (joint * (joint.log() - rows.log() - columns.log())).sum(dim=(1, 2)).mean()


class SliceNetwork(nn.Module):
    """A convolutional trunk over 2D slices with two linear heads: K parts, and more for over-clustering."""

    def __init__(self, channels: Sequence[int | None], dilations: Sequence[int], heads: Sequence[int]):
        super().__init__()
        layers, before, dilations = [], 1, iter(dilations)
        for after in channels:
            if after is None:
                layers.append(nn.MaxPool2d(2))
                continue
            dilation = next(dilations)
            layers += [nn.Conv2d(before, after, 3, padding=dilation, dilation=dilation, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Conv2d(before, parts, 1) for parts in heads)

    def forward(self, slices: torch.Tensor, head: int = 0) -> torch.Tensor:
        """Soft parts (B, K, H, W) of slices (B, 1, H, W)."""
        logits = self.heads[head](self.trunk(slices))
        return F.interpolate(logits.float().softmax(dim=1), slices.shape[2:], mode="bilinear", align_corners=False)


class IIC(TrainedBaseline):
    """Segmentation of slices that maximises the mutual information between the parts of neighbouring pixels.

    A batch holds slices orthogonal to the last axis and copies of them with other brightness and contrast and,
    half of them, mirrored; the copies' segmentations are mirrored back. The two heads are trained in turn.
    """

    name = "Ji et al. (IIC)"
    presets = {  # noqa: RUF012
        "paper": IICConfig(),
        "small": IICConfig(
            channels=(16, 32, None, 64, 64),
            dilations=(1, 1, 1, 2),
            heads_alternate=20,
            batch_size=16,
            steps=500,
            learning_rate=1e-3,
        ),
    }

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]."""
        c = self.config
        heads = (self.num_parts, self.num_parts * c.over_clustering)
        network = self.seeded(lambda: SliceNetwork(c.channels, c.dilations, heads)).to(self.device)

        def loss(step: int) -> torch.Tensor:
            head = 1 - step // c.heads_alternate % 2
            slices = draw_slices(volumes, c.batch_size).to(self.device)
            copies, mirrored = self._copies(slices)
            both = network(torch.cat([slices, copies]), head)
            first, second = both.chunk(2)
            second = torch.where(mirrored, second.flip(3), second)
            return -shifted_mutual_information(first, second, c.max_shift)

        schedule = Schedule(c.steps, c.learning_rate)
        self.train(network, loss, schedule, place(folder, f"iic-{self.num_parts}"))
        self.network = network

    def _copies(self, slices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Jittered copies (B, 1, H, W) of slices, and which of them are mirrored, (B, 1, 1, 1)."""
        amount = self.config.jitter
        brightness, contrast = (1 + amount * (2 * torch.rand(2, len(slices), 1, 1, 1) - 1)).to(slices.device)
        mean = slices.mean(dim=(2, 3), keepdim=True)
        copies = (mean + contrast * (slices - mean)) * brightness
        mirrored = (torch.rand(len(slices), 1, 1, 1) < 0.5).to(slices.device)
        return torch.where(mirrored, copies.flip(3), copies), mirrored

    @torch.no_grad()
    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume slice by slice: (H, W, D) uint8."""
        slices = volume.permute(3, 0, 1, 2)  # (D, 1, H, W)
        labels = [self.network(part.to(self.device)).argmax(dim=1).cpu() for part in slices.split(64)]
        return torch.cat(labels).permute(1, 2, 0).numpy().astype(np.uint8)


def draw_slices(volumes: Sequence[dict], count: int) -> torch.Tensor:
    """Random slices (count, 1, H, W) orthogonal to the last axis, from the global generator."""
    chosen = torch.randint(len(volumes), (count,)).tolist()
    found = [volumes[i]["volume"] for i in chosen]
    return torch.stack([v[..., int(torch.randint(v.shape[-1], ()))] for v in found])

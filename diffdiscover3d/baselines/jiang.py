"""Two-stage cascaded U-Net, trained with all labels (Jiang et al., BrainLes 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.cicek import draw_labelled, label_in_windows
from diffdiscover3d.baselines.fitting import Schedule
from diffdiscover3d.baselines.supervision import HIDDEN, best_numbering_loss
from diffdiscover3d.models.cpu_kernels import precise_if_small

_BLOCKS_DOWN, _BLOCKS_UP = (1, 2, 2, 4), (1, 1, 1)


@dataclass(frozen=True)
class JiangConfig:
    """Hyper-parameters of [`Jiang`].

    Attributes:
        widths: channels of the two stages at the finest resolution, multiples of 8; doubled at each of three coarser.
        crop: side of the cubes cut out for training, a multiple of 8.
        batch_size: cubes in a batch.
        steps, learning_rate, weight_decay: of Adam, its rate falling to zero with power 0.9.
        bf16: train under bfloat16 autocast.
        max_gamma: as for [`CicekConfig`].
    """

    widths: tuple[int, int] = (16, 32)
    crop: int = 128
    batch_size: int = 1
    steps: int = 135_000
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    bf16: bool = False
    max_gamma: float = 1.2


def soft_dice_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 − soft Dice with squared denominators of each volume, averaged over the parts.

    Args:
        logits: (B, K, H, W, D).
        labels: (B, H, W, D) int64; voxels whose label is not given do not count.

    Returns:
        (B,).
    """
    given = (labels != HIDDEN)[:, None]
    soft = logits.float().softmax(dim=1) * given
    true = F.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1).float() * given
    overlap = 2 * (soft * true).flatten(2).sum(dim=2)
    total = soft.square().flatten(2).sum(dim=2) + true.flatten(2).sum(dim=2)
    return (1 - (overlap + 1e-5) / (total + 1e-5)).mean(dim=1)


class CascadedUNet(nn.Module):
    """A coarse U-Net, and a wider one that also sees its soft parts and has two decoders."""

    def __init__(self, widths: tuple[int, int], num_parts: int):
        super().__init__()
        from monai.networks.nets import SegResNet

        def make(width: int, inputs: int, upsampling: str) -> SegResNet:
            return SegResNet(
                spatial_dims=3,
                init_filters=width,
                in_channels=inputs,
                out_channels=num_parts,
                blocks_down=_BLOCKS_DOWN,
                blocks_up=_BLOCKS_UP,
                upsample_mode=upsampling,
            )

        self.coarse = make(widths[0], 1, "deconv")
        self.fine = make(widths[1], 1 + num_parts, "deconv")
        second = make(widths[1], 1 + num_parts, "nontrainable")  # interpolation in place of transposed convolutions
        self.second_up_samples, self.second_up_layers = second.up_samples, second.up_layers
        self.second_final = second.conv_final

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, H, W, D) of the second stage's first decoder."""
        return self.stages(x)[1]

    def stages(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of the first stage and of the second one's two decoders."""
        coarse = self.coarse(x)
        bottom, skips = self.fine.encode(torch.cat([x, coarse.float().softmax(dim=1).to(x.dtype)], dim=1))
        skips = skips[::-1]
        second = bottom
        for up, layer, skip in zip(self.second_up_samples, self.second_up_layers, skips[1:], strict=True):
            second = layer(up(second) + skip)
        return coarse, self.fine.decode(bottom, skips), self.second_final(second)


class Jiang(TrainedBaseline):
    """The first-placed method of BraTS 2019, here for exclusive parts: soft Dice of all three outputs."""

    name = "Jiang et al."
    presets = {  # noqa: RUF012
        "paper": JiangConfig(),
        "small": JiangConfig(widths=(8, 8), crop=48, batch_size=1, steps=1_500, learning_rate=2e-3, bf16=True),
    }

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]; labels are those of the number of parts."""
        c = self.config
        network = self.place_network(self.seeded(lambda: CascadedUNet(c.widths, self.num_parts)))

        def loss(_) -> torch.Tensor:
            x, labels = (t.to(self.device) for t in draw_labelled(volumes, c.batch_size, c.crop, c.max_gamma))
            with precise_if_small(x, 8):
                outputs = network.stages(x)
            return best_numbering_loss(
                lambda y: sum(soft_dice_losses(logits, y) for logits in outputs), labels, self.num_parts
            )

        schedule = Schedule(c.steps, c.learning_rate, decay="poly", weight_decay=c.weight_decay, bf16=c.bf16)
        target = place(folder, f"jiang-{self.num_parts}")
        self.train(network, loss, schedule, target)
        self.network = network

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        return label_in_windows(self.network, volume, self.config.crop, self.device)

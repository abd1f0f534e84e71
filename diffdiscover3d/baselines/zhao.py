"""Data augmentation with learned transformations from one labelled volume (Zhao et al., CVPR 2019)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.cicek import label_volume, make_unet
from diffdiscover3d.baselines.fitting import Schedule
from diffdiscover3d.baselines.supervision import HIDDEN, class_weights, sparse_cross_entropy
from diffdiscover3d.data.transforms import pad_to_multiple
from diffdiscover3d.errors import InputError
from diffdiscover3d.models.cpu_kernels import precise_if_small


@dataclass(frozen=True)
class ZhaoConfig:
    """Hyper-parameters of [`Zhao`].

    Attributes:
        channels: of all three U-Nets, finest resolution first.
        batch_size: volumes in a batch.
        registration_steps, appearance_steps, segmentation_steps: of the three trainings.
        learning_rate: of Adam; 1e-3 is used for the segmenter's training with a falling rate.
        window: side of the cubes of the local cross-correlation.
        lambda_flow: weight of the flow's squared gradient.
        lambda_appearance: weight of the gradient of the change of appearance within parts.
        squarings: by which a velocity is integrated to a flow.
        bf16: run the three U-Nets, not the losses, under bfloat16 autocast.
    """

    channels: tuple[int, ...] = (16, 32, 32, 32)
    batch_size: int = 1
    registration_steps: int = 30_000
    appearance_steps: int = 30_000
    segmentation_steps: int = 30_000
    learning_rate: float = 5e-4
    window: int = 9
    lambda_flow: float = 1.0
    lambda_appearance: float = 0.02
    squarings: int = 5
    bf16: bool = False


class TransformNetworks(nn.Module):
    """A U-Net that maps (atlas, target) to a velocity, and one that maps (atlas, aligned target) to a change."""

    def __init__(self, config: ZhaoConfig):
        super().__init__()
        from monai.networks.blocks import DVF2DDF, Warp

        self.stride, self.bf16 = 2 ** (len(config.channels) - 1), config.bf16
        self.registration = make_unet(config.channels, 2, 3)
        self.appearance = make_unet(config.channels, 2, 1)
        self.integrate = DVF2DDF(num_steps=config.squarings, mode="bilinear", padding_mode="border")
        self.linear = Warp(mode="bilinear", padding_mode="border")
        self.nearest = Warp(mode="nearest", padding_mode="border")

    def velocity(self, atlas: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Velocity (B, 3, H, W, D) in voxels that carries the atlas onto the targets (B, 1, H, W, D)."""
        return self._run(self.registration, atlas, target)

    def change(self, atlas: torch.Tensor, aligned: torch.Tensor) -> torch.Tensor:
        """Change of intensities (B, 1, H, W, D) that gives the atlas the look of targets aligned to it."""
        return self._run(self.appearance, atlas, aligned)

    def flow(self, velocity: torch.Tensor) -> torch.Tensor:
        """Displacement (B, 3, H, W, D): the warped image at v is the image at v plus the displacement."""
        return self.integrate(velocity)

    def _run(self, network: nn.Module, atlas: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        h, w, d = other.shape[2:]
        both = torch.cat([atlas.expand_as(other), other], dim=1)
        padded = pad_to_multiple(both, self.stride)
        with torch.autocast(both.device.type, torch.bfloat16, enabled=self.bf16), precise_if_small(padded, self.stride):
            return network(padded)[..., :h, :w, :d].float()


def gradient_penalty(field: torch.Tensor, keep: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """Mean squared difference between neighbouring voxels of (B, C, H, W, D), averaged over the axes.

    Args:
        keep: for each axis which differences count, (1, 1, ...) bool of the differences' grid; default: all.
    """
    terms = []
    for axis in range(3):
        squared = field.diff(dim=axis + 2).square()
        if keep is None:
            terms.append(squared.mean())
        else:
            chosen = keep[axis].to(squared.dtype).expand_as(squared)
            terms.append((squared * chosen).sum() / chosen.sum().clamp(min=1))
    return sum(terms) / 3


class Zhao(TrainedBaseline):
    """Spatial and appearance changes are learned without labels, and used to make labelled volumes from one.

    A registration network learns to carry the labelled volume, the atlas, onto every other volume; the similarity is
    the squared local cross-correlation. A second network learns the difference of intensities that is left. A
    segmenter is trained on the atlas with the appearance of one volume and the shape of another, with labels that are
    warped along.
    """

    name = "Zhao et al."
    presets = {  # noqa: RUF012
        "paper": ZhaoConfig(),
        "small": ZhaoConfig(
            channels=(8, 16, 32, 32),
            batch_size=1,
            registration_steps=300,
            appearance_steps=200,
            segmentation_steps=500,
            learning_rate=2e-3,
            bf16=True,
        ),
    }

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]; all volumes have one shape. Both transforms are shared between levels.

        Raises:
            InputError: if not exactly one volume is labelled.
        """
        c = self.config
        labelled = [i for i in range(len(volumes)) if (volumes[i]["labels"] != HIDDEN).any()]
        if len(labelled) != 1:
            raise InputError(f"exactly one volume must be labelled, got {len(labelled)}.")
        atlas_item = volumes[labelled[0]]
        atlas, labels = atlas_item["volume"][None].to(self.device), atlas_item["labels"].to(self.device)
        transforms = self.place_network(self.seeded(lambda: TransformNetworks(c)))
        self._learn_shapes(transforms, volumes, atlas, folder)
        self._learn_appearances(transforms, volumes, atlas, labels, folder)
        self._learn_to_segment(transforms, volumes, atlas, labels, labelled[0], folder)

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        return label_volume(self.network, volume, 2 ** (len(self.config.channels) - 1), self.device)

    def _draw(self, volumes: Sequence[dict]) -> torch.Tensor:
        chosen = torch.randint(len(volumes), (self.config.batch_size,)).tolist()
        return torch.stack([volumes[i]["volume"] for i in chosen]).to(self.device)

    def _learn_shapes(self, transforms: TransformNetworks, volumes, atlas, folder) -> None:
        from monai.losses import LocalNormalizedCrossCorrelationLoss

        c = self.config
        dissimilarity = LocalNormalizedCrossCorrelationLoss(spatial_dims=3, kernel_size=c.window)

        def loss(_) -> torch.Tensor:
            targets = self._draw(volumes)
            velocity = transforms.velocity(atlas, targets)
            warped = transforms.linear(atlas.expand_as(targets), transforms.flow(velocity))
            return dissimilarity(warped, targets) + c.lambda_flow * gradient_penalty(velocity)

        schedule = Schedule(c.registration_steps, c.learning_rate)
        target = place(folder, "registration")
        self.train(transforms.registration, loss, schedule, target)

    def _learn_appearances(self, transforms: TransformNetworks, volumes, atlas, labels, folder) -> None:
        c = self.config
        keep = [(labels.diff(dim=axis) == 0)[None, None] for axis in range(3)]  # not across the parts' boundaries

        def loss(_) -> torch.Tensor:
            targets = self._draw(volumes)
            with torch.no_grad():
                inverse = transforms.flow(-transforms.velocity(atlas, targets))
                aligned = transforms.linear(targets, inverse)
            change = transforms.change(atlas, aligned)
            return F.mse_loss(atlas + change, aligned) + c.lambda_appearance * gradient_penalty(change, keep)

        transforms.registration.eval().requires_grad_(False)
        schedule = Schedule(c.appearance_steps, c.learning_rate)
        target = place(folder, f"appearance-{self.num_parts}")
        self.train(transforms.appearance, loss, schedule, target)

    def _learn_to_segment(self, transforms: TransformNetworks, volumes, atlas, labels, number, folder) -> None:
        c = self.config
        transforms.eval().requires_grad_(False)
        network = self.place_network(self.seeded(lambda: make_unet(c.channels, 1, self.num_parts)))
        weights = class_weights([volumes[number]], self.num_parts).to(self.device)
        grid = atlas.shape[2:]

        def loss(_) -> torch.Tensor:
            with torch.no_grad():
                x, y = self.synthesize(transforms, atlas, labels, self._draw(volumes), self._draw(volumes))
                x = pad_to_multiple(x, transforms.stride)
            precise = precise_if_small(x, transforms.stride)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=c.bf16), precise:
                logits = network(x)[..., : grid[0], : grid[1], : grid[2]]
            return sparse_cross_entropy(logits, y, weights).mean()

        schedule = Schedule(c.segmentation_steps, c.learning_rate, decay="cosine")
        target = place(folder, f"segmenter-{self.num_parts}")
        self.train(network, loss, schedule, target)
        self.network = network

    @staticmethod
    def synthesize(
        transforms: TransformNetworks,
        atlas: torch.Tensor,
        labels: torch.Tensor,
        looks: torch.Tensor,
        shapes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Labelled volumes: the atlas with the appearance of `looks`, in the shape of `shapes`, both (B, 1, H, W, D).

        Returns:
            Volumes (B, 1, H, W, D) in [0, 1] and labels (B, H, W, D).
        """
        inverse = transforms.flow(-transforms.velocity(atlas, looks))
        changed = atlas + transforms.change(atlas, transforms.linear(looks, inverse))
        flow = transforms.flow(transforms.velocity(atlas, shapes))
        warped = transforms.linear(changed, flow).clamp(0, 1)
        carried = transforms.nearest(labels[None, None].float().expand_as(shapes).contiguous(), flow)
        return warped, carried[:, 0].round().long()

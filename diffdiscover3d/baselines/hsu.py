"""Hyperbolic variational autoencoder of patches (Hsu et al., NeurIPS 2021)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.fitting import Schedule
from diffdiscover3d.baselines.patches import PatchEncoder, encode_volume
from diffdiscover3d.baselines.poincare import Gyroplanes, ball, poincare_kmeans, wrapped_normal_log_density


@dataclass(frozen=True)
class HsuConfig:
    """Hyper-parameters of [`Hsu`].

    Attributes:
        patch: side of an encoded patch.
        kernels, channels, paddings: of the encoder's convolutions, which the decoder mirrors.
        hidden: width of the linear layer after them, and number of gyroplanes of the decoder.
        latent: dimension of the Poincaré ball.
        parent_scale: largest side of a parent patch, times `patch`; children have half their parent's side.
        batch_size: parents in a batch.
        steps, learning_rate: of Adam with AMSGrad.
        beta: weight of the divergence from the prior.
        lambda_triplet, margin: of the triplet loss.
        cluster_voxels: voxels of a volume on which Poincaré k-means finds its centres.
    """

    patch: int = 10
    kernels: tuple[int, ...] = (5, 5, 5, 5)
    channels: tuple[int, ...] = (16, 32, 64, 128)
    paddings: tuple[int, ...] = (2, 1, 1, 0)
    hidden: int = 300
    latent: int = 2
    parent_scale: float = 2.0
    batch_size: int = 128
    steps: int = 100_000
    learning_rate: float = 5e-7
    beta: float = 1.0
    lambda_triplet: float = 1e3
    margin: float = 0.2
    cluster_voxels: int = 20_000


class HyperbolicVAE(nn.Module):
    """Encoder to a wrapped normal distribution on the Poincaré ball, and a decoder that starts with gyroplanes."""

    def __init__(self, config: HsuConfig):
        super().__init__()
        self.latent = config.latent
        layout = zip(config.kernels, config.channels, config.paddings, (1, *config.channels), strict=False)
        self.encoder = PatchEncoder(
            config.kernels, config.channels, config.hidden, config.patch, paddings=config.paddings
        )
        self.mean = nn.Linear(config.hidden, config.latent)
        self.spread = nn.Linear(config.hidden, config.latent)
        self.gyroplanes = Gyroplanes(config.latent, config.hidden)
        self.widen = nn.Linear(config.hidden, config.channels[-1] * self.encoder.side**3)
        layers: list[nn.Module] = []
        for kernel, channels, padding, outputs in reversed(list(layout)):
            # with stride 1 a transposed convolution is one with a wide padding, which is faster on CPUs
            layers += [nn.ReLU(), nn.Conv3d(channels, outputs, kernel, padding=kernel - 1 - padding)]
        self.decoder = nn.Sequential(*layers)

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means on the ball (N, latent) and standard deviations (N, latent) of patches (N, 1, s, s, s)."""
        hidden = F.relu(self.encoder(patches))
        return self.embed(hidden), F.softplus(self.spread(hidden)) + 1e-5

    def embed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Means on the ball from the encoder's hidden features, (N, hidden)."""
        return ball.expmap0(self.mean(hidden))

    def decode(self, points: torch.Tensor) -> torch.Tensor:
        """Patches (N, 1, s, s, s) from points on the ball."""
        planes = F.relu(self.gyroplanes(points))
        return self.decoder(self.widen(planes).unflatten(1, (-1, *[self.encoder.side] * 3)))


class Hsu(TrainedBaseline):
    """Embedding of patches on the Poincaré ball, in which a patch is near the patches it contains.

    The loss is the negative evidence lower bound of a variational autoencoder with a wrapped normal prior and
    posterior, plus a triplet loss: the mean of a parent patch is nearer to that of a child patch inside it than to that
    of a patch elsewhere. Patches of all sizes are resized to one. A volume is segmented by k-means on the ball over the
    means of its voxel-centred patches, so one training serves every number of parts.
    """

    name = "Hsu et al."
    presets = {  # noqa: RUF012
        "paper": HsuConfig(),
        "small": HsuConfig(
            patch=9,
            kernels=(5, 3, 3),
            channels=(16, 32, 64),
            paddings=(0, 0, 0),
            hidden=64,
            batch_size=32,
            steps=3_000,
            learning_rate=5e-4,
        ),
    }

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]."""
        c = self.config
        network = self.seeded(lambda: HyperbolicVAE(c)).to(self.device)

        def loss(_) -> torch.Tensor:
            parents, children, others = (
                x.to(self.device) for x in draw_families(volumes, c.batch_size, c.patch, c.parent_scale)
            )
            means, spreads = network(torch.cat([parents, children, others]))
            bound = self._negative_bound(network, torch.cat([parents, children, others]), means, spreads)
            p, child, other = means.chunk(3)
            triplet = F.relu(ball.dist(p, child) - ball.dist(p, other) + c.margin).mean()
            return bound + c.lambda_triplet * triplet

        schedule = Schedule(c.steps, c.learning_rate, amsgrad=True, clip=1e3)
        self.train(network, loss, schedule, place(folder, "hsu"))
        self.network = network

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        network = self.network
        points = encode_volume(network.encoder, volume, lambda z: network.embed(F.relu(z))).double()
        rng = np.random.default_rng(self.seed)
        chosen = torch.from_numpy(rng.permutation(len(points))[: self.config.cluster_voxels])
        centres = poincare_kmeans(points[chosen], self.num_parts, seed=self.seed)
        labels = torch.cat([ball.dist(part[:, None], centres[None]).argmin(dim=1) for part in points.split(100_000)])
        return labels.reshape(volume.shape[1:]).numpy().astype(np.uint8)

    def _negative_bound(
        self, network: HyperbolicVAE, patches: torch.Tensor, means: torch.Tensor, spreads: torch.Tensor
    ) -> torch.Tensor:
        """Squared error of reconstructions plus the divergence from the prior, both from one sample of each patch."""
        velocity = spreads * torch.randn_like(spreads)
        origin = torch.zeros_like(means)
        points = ball.expmap(means, ball.transp0(means, velocity / ball.lambda_x(origin, keepdim=True)))
        points = ball.projx(points)
        error = (network.decode(points) - patches).square().flatten(1).sum(dim=1)
        posterior = wrapped_normal_log_density(points, means, spreads)
        prior = wrapped_normal_log_density(points, origin, torch.ones_like(spreads))
        return (error / 2 + self.config.beta * (posterior - prior)).mean()


def draw_families(
    volumes: Sequence[dict], count: int, size: int, parent_scale: float, num_volumes: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random parent patches, a child patch inside each, and a patch of the child's side elsewhere in the same volume.

    Parents have random sides from `size` to `parent_scale` times that, children half of it. All are resized to `size`.
    Draws from the global generator.

    Returns:
        Three tensors (count, 1, size, size, size).
    """
    share = math.ceil(count / num_volumes)
    found: tuple[list, list, list] = ([], [], [])
    for _ in range(num_volumes):
        volume = volumes[int(torch.randint(len(volumes), ()))]["volume"]
        extent = torch.tensor(volume.shape[1:], dtype=torch.float32)
        sides = size * (1 + (parent_scale - 1) * torch.rand(share, 1))
        half = sides / 2
        parents = sides / 2 + torch.rand(share, 3) * (extent - sides)  # centres, in voxels from the corner
        children = parents + (torch.rand(share, 3) - 0.5) * (sides - half)
        others = half / 2 + torch.rand(share, 3) * (extent - half)
        inside = ((others - parents).abs() < sides / 2).all(dim=1, keepdim=True)
        # shifted by half of the volume, the point is outside of the parent or at its boundary
        others = torch.where(inside, (others + extent / 2) % extent, others)
        others = torch.minimum(torch.maximum(others, half / 2), extent - half / 2)
        for patches, centres, side in zip(found, (parents, children, others), (sides, half, half), strict=True):
            patches.append(resample(volume, centres, side, size))
    return tuple(torch.cat(patches)[:count] for patches in found)


def resample(volume: torch.Tensor, centres: torch.Tensor, sides: torch.Tensor, size: int) -> torch.Tensor:
    """Cubes (N, 1, size, size, size) around centres (N, 3) with sides (N, 1), both in voxels, by linear interpolation.

    The centre of voxel i is at i + 0.5.
    """
    steps = (torch.arange(size) + 0.5) / size - 0.5
    offsets = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1)
    points = centres[:, None, None, None] + sides[:, None, None, None] * offsets
    extent = torch.tensor(volume.shape[1:], dtype=torch.float32)
    grid = (2 * points / extent - 1).flip(-1)  # grid_sample has the last axis first
    flat = grid.reshape(1, -1, size, size, 3)
    cubes = F.grid_sample(volume[None], flat, mode="bilinear", padding_mode="border", align_corners=False)
    return cubes.reshape(len(centres), 1, size, size, size)

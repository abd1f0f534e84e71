"""3D convolutional autoencoder with a clustering layer (Nalepa et al., IEEE GRSL 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn

from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.fitting import Schedule
from diffdiscover3d.baselines.patches import PatchEncoder, draw_patches, encode_volume


@dataclass(frozen=True)
class NalepaConfig:
    """Hyper-parameters of [`Nalepa`].

    Attributes:
        patch: side of a patch, odd.
        channels: of the two convolutions.
        features: length of the latent vector.
        dropout: probability.
        pool_patches: patches that are drawn once; an epoch goes through all of them.
        batch_size: patches in a batch.
        pretraining_steps, learning_rate: of the autoencoder alone.
        clustering_epochs: epochs with the clustering layer, which has the same learning rate.
        lambda_clustering: weight of the divergence.
    """

    patch: int = 5
    channels: int = 32
    features: int = 25
    dropout: float = 0.5
    pool_patches: int = 200_000
    batch_size: int = 256
    pretraining_steps: int = 20_000
    learning_rate: float = 1e-3
    clustering_epochs: int = 25
    lambda_clustering: float = 0.1


def soft_assignment(latents: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Student-t similarity (one degree of freedom) of latents (N, F) to centres (K, F): (N, K), rows sum to 1."""
    q = 1 / (1 + torch.cdist(latents, centres).square())
    return q / q.sum(dim=1, keepdim=True)


def target_distribution(q: torch.Tensor) -> torch.Tensor:
    """The target of deep embedded clustering (Xie et al., ICML 2016): q² / Σ_n q, with rows scaled to sum to 1."""
    p = q.square() / q.sum(dim=0, keepdim=True)
    return p / p.sum(dim=1, keepdim=True)


class Autoencoder(nn.Module):
    """Two unpadded convolutions and a linear layer, mirrored by the decoder."""

    def __init__(self, patch: int, channels: int, features: int, dropout: float):
        super().__init__()
        kernel = (patch + 1) // 2
        self.encoder = PatchEncoder((kernel, kernel), (channels, channels), features, patch, dropout=dropout)
        self.widen = nn.Linear(features, channels)
        self.decoder = nn.Sequential(
            nn.ReLU(),
            # with stride 1 a transposed convolution is one with a wide padding, which is faster on CPUs
            nn.Conv3d(channels, channels, kernel, padding=kernel - 1),
            nn.ReLU(),
            nn.Conv3d(channels, 1, kernel, padding=kernel - 1),
        )

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (N, F) and reconstructions of patches (N, 1, s, s, s)."""
        latents = self.encoder(patches)
        return latents, self.decoder(self.widen(latents)[:, :, None, None, None])


class ClusteringAutoencoder(nn.Module):
    """An autoencoder, cluster centres (K, F), and the present target distribution (N, K)."""

    def __init__(self, autoencoder: Autoencoder, centres: torch.Tensor, num_patches: int):
        super().__init__()
        self.autoencoder = autoencoder
        self.centres = nn.Parameter(centres.clone())
        self.register_buffer("target", torch.zeros(num_patches, len(centres)))


class Nalepa(TrainedBaseline):
    """Autoencoder of voxel-centred patches, then a clustering layer trained over all volumes together.

    First the autoencoder learns to reconstruct patches. Then centres start from k-means of the latents, and
    autoencoder and centres are trained with the reconstruction error plus 0.1 times the divergence of the soft
    assignment from its target, which is refreshed each epoch. A voxel gets the part of its most similar centre.
    """

    name = "Nalepa et al."
    presets = {  # noqa: RUF012
        "paper": NalepaConfig(),
        "small": NalepaConfig(pool_patches=40_000, pretraining_steps=1_500, clustering_epochs=10),
    }

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]; pretraining is shared between numbers of parts."""
        c = self.config
        patches = self.seeded(lambda: draw_patches(volumes, c.pool_patches, c.patch, num_volumes=len(volumes)))
        autoencoder = self.seeded(lambda: Autoencoder(c.patch, c.channels, c.features, c.dropout)).to(self.device)

        def batch() -> torch.Tensor:
            return patches[torch.randint(len(patches), (c.batch_size,))].to(self.device)

        def reconstruction(_) -> torch.Tensor:
            x = batch()
            return F.mse_loss(autoencoder(x)[1], x)

        schedule = Schedule(c.pretraining_steps, c.learning_rate)
        self.train(autoencoder, reconstruction, schedule, place(folder, "pretraining"))

        latents = self._latents(autoencoder, patches)
        kmeans = KMeans(self.num_parts, n_init=3, random_state=self.seed).fit(latents.numpy())
        centres = torch.from_numpy(kmeans.cluster_centers_).float()
        network = ClusteringAutoencoder(autoencoder, centres, len(patches)).to(self.device)
        epoch = -(-len(patches) // c.batch_size)

        def clustering(step: int) -> torch.Tensor:
            if step % epoch == 0:
                autoencoder.eval()
                q = soft_assignment(self._latents(autoencoder, patches).to(self.device), network.centres.detach())
                network.target.copy_(target_distribution(q))
                autoencoder.train()
            chosen = torch.randint(len(patches), (c.batch_size,))
            x = patches[chosen].to(self.device)
            z, reconstructed = autoencoder(x)
            q = soft_assignment(z, network.centres)
            divergence = F.kl_div(q.log(), network.target[chosen], reduction="batchmean")
            return F.mse_loss(reconstructed, x) + c.lambda_clustering * divergence

        schedule = Schedule(epoch * c.clustering_epochs, c.learning_rate)
        target = place(folder, f"clustering-{self.num_parts}")
        self.train(network, clustering, schedule, target)
        self.network = network

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        centres = self.network.centres.detach()
        encoder = self.network.autoencoder.encoder
        labels = encode_volume(encoder, volume, lambda z: torch.cdist(z, centres).argmin(dim=1))
        return labels.reshape(volume.shape[1:]).numpy().astype(np.uint8)

    @torch.no_grad()
    def _latents(self, autoencoder: Autoencoder, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([autoencoder.encoder(x.to(self.device)).cpu() for x in patches.split(4096)])

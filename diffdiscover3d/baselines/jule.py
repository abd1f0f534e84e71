"""Joint unsupervised learning of 3D patches (Moriya et al., SPIE Medical Imaging 2018; Yang et al., CVPR 2016)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from diffdiscover3d.baselines.agglomeration import affinity_graph, initial_clusters, merge_clusters
from diffdiscover3d.baselines.base import TrainedBaseline, place
from diffdiscover3d.baselines.fitting import Schedule
from diffdiscover3d.baselines.patches import PatchEncoder, draw_patches, encode_volume


@dataclass(frozen=True)
class JuleConfig:
    """Hyper-parameters of [`Jule`].

    Attributes:
        patch: side of a patch.
        kernels, channels: of the convolutions, each with batch normalisation; then 2³ max pooling.
        features: length of the feature vector, which is scaled to length 1.
        num_patches: patches that are clustered.
        neighbours: of a patch in the affinity graph.
        unrolling: fraction of the clusters that are merged in a period.
        final_clusters: at which merging ends.
        epochs: over the patches in each period.
        batch_size: anchors in a batch.
        negatives: nearest other clusters from which an anchor gets a negative.
        positive_weight, margin: of the triplet loss.
        learning_rate: of Adam.
    """

    patch: int = 27
    kernels: tuple[int, ...] = (5, 5, 5)
    channels: tuple[int, ...] = (50, 50, 50)
    features: int = 160
    num_patches: int = 10_000
    neighbours: int = 20
    unrolling: float = 0.9
    final_clusters: int = 100
    epochs: int = 20
    batch_size: int = 100
    negatives: int = 5
    positive_weight: float = 2.0
    margin: float = 0.2
    learning_rate: float = 1e-3


def triplet_loss(
    anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, positive_weight: float, margin: float
) -> torch.Tensor:
    """Mean of max(0, w·‖a − p‖² − ‖a − n‖² + margin) over anchors and their negatives.

    Args:
        anchors, positives: (B, F).
        negatives: (B, M, F).
    """
    near = (anchors - positives).square().sum(dim=1, keepdim=True)
    far = (anchors[:, None] - negatives).square().sum(dim=2)
    return F.relu(positive_weight * near - far + margin).mean()


class JuleNetwork(nn.Module):
    """The patch encoder, and for each patch its present cluster and the nearest other ones; -1 before the first."""

    def __init__(self, config: JuleConfig):
        super().__init__()
        self.encoder = PatchEncoder(
            config.kernels, config.channels, config.features, config.patch, pool=True, norm=True
        )
        self.register_buffer("clusters", torch.full((config.num_patches,), -1, dtype=torch.int64))
        self.register_buffer("others", torch.full((config.num_patches, config.negatives), -1, dtype=torch.int64))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Features (N, F) of length 1."""
        return F.normalize(self.encoder(patches), dim=1)


class Jule(TrainedBaseline):
    """Patches are merged into clusters, which in turn teach the network that encodes the patches.

    In each period a fraction of the clusters is merged by their affinity in a graph of nearest neighbours, and the
    network is trained with a triplet loss on the clusters. A volume is segmented by k-means on the features of all its
    voxels, so one training serves every number of parts.
    """

    name = "Moriya et al. (JULE)"
    presets = {  # noqa: RUF012
        "paper": JuleConfig(),
        "small": JuleConfig(
            patch=13,
            kernels=(5, 3, 3),
            channels=(16, 16, 32),
            features=32,
            num_patches=3_000,
            final_clusters=50,
            unrolling=0.6,
            epochs=4,
        ),
    }

    def fit(self, volumes: Sequence[dict], folder: Path | None = None) -> None:
        """See [`TrainedBaseline.fit`]."""
        c = self.config
        patches = self.seeded(lambda: draw_patches(volumes, c.num_patches, c.patch, num_volumes=len(volumes)))
        network = self.seeded(lambda: JuleNetwork(c)).to(self.device)
        period = -(-c.num_patches // c.batch_size) * c.epochs

        def loss(step: int) -> torch.Tensor:
            if step % period == 0:
                self._recluster(network, patches, step // period == self._periods() - 1)
            anchors, positives, negatives = self._draw_triplets(network.clusters.cpu(), network.others.cpu())
            rows = torch.cat([anchors, positives, negatives.flatten()])
            features = network(patches[rows].to(self.device))
            a, p, n = features.split([len(anchors), len(positives), negatives.numel()])
            return triplet_loss(a, p, n.reshape(*negatives.shape, -1), c.positive_weight, c.margin)

        schedule = Schedule(period * self._periods(), c.learning_rate)
        self.train(network, loss, schedule, place(folder, "jule"))
        self.network = network

    def predict(self, volume: torch.Tensor) -> np.ndarray:
        """Label a (1, H, W, D) volume: (H, W, D) uint8."""
        features = encode_volume(self.network.encoder, volume, lambda z: F.normalize(z, dim=1)).numpy()
        clusters = MiniBatchKMeans(self.num_parts, n_init=3, batch_size=4096, random_state=self.seed)
        return clusters.fit_predict(features).reshape(volume.shape[1:]).astype(np.uint8)

    def _periods(self) -> int:
        """How many periods of merging lead from about one cluster in four patches to the final number."""
        clusters, periods = self.config.num_patches / 4, 1
        while clusters > self.config.final_clusters:
            clusters, periods = clusters * (1 - self.config.unrolling), periods + 1
        return periods

    @torch.no_grad()
    def _recluster(self, network: JuleNetwork, patches: torch.Tensor, last: bool) -> None:
        """One period of merging: the first only joins nearest neighbours, the last merges to the final number."""
        network.eval()
        features = torch.cat([network(x.to(self.device)).cpu() for x in patches.split(500)]).numpy()
        network.train()
        graph = affinity_graph(features, self.config.neighbours)
        clusters = network.clusters.cpu().numpy()
        if clusters.min() < 0:
            clusters = initial_clusters(features)
        else:
            count = clusters.max() + 1
            wanted = 0 if last else round(count * (1 - self.config.unrolling))
            wanted = max(self.config.final_clusters, wanted)
            clusters = merge_clusters(graph, clusters, min(count, wanted))
        network.clusters.copy_(torch.from_numpy(clusters))
        network.others.copy_(torch.from_numpy(nearest_clusters(features, clusters, self.config.negatives)[clusters]))

    def _draw_triplets(
        self, clusters: torch.Tensor, others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices of anchors (B), positives (B) of the same cluster, and negatives (B, M) of the nearest clusters."""
        c = self.config
        order = torch.argsort(clusters, stable=True)
        sizes = torch.bincount(clusters)
        starts = sizes.cumsum(0) - sizes
        anchors = torch.randint(len(clusters), (c.batch_size,))
        own = clusters[anchors]
        positives = order[starts[own] + (torch.rand(len(own)) * sizes[own]).long()]
        other = others[anchors]
        negatives = order[starts[other] + (torch.rand(other.shape) * sizes[other]).long()]
        return anchors, positives, negatives


def nearest_clusters(features: np.ndarray, clusters: np.ndarray, count: int) -> np.ndarray:
    """For each cluster the `count` others with the nearest mean, (C, count); repeated if there are fewer."""
    sizes = np.bincount(clusters)
    means = np.stack([np.bincount(clusters, weights=column) for column in features.T], axis=1) / sizes[:, None]
    distances = ((means[:, None] - means[None]) ** 2).sum(axis=2)
    order = distances.argsort(axis=1, kind="stable")
    found = np.stack([row[row != own] for own, row in enumerate(order)])
    return np.take(found, np.arange(count) % found.shape[1], axis=1)

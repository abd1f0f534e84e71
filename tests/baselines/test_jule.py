"""The merging of clusters against the definition of their affinity, and the triplets."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse

from diffdiscover3d.baselines.agglomeration import affinity_graph, initial_clusters, merge_clusters
from diffdiscover3d.baselines.jule import Jule, nearest_clusters, triplet_loss
from tests.baselines.toys import many_halves


def blobs(count: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(centre, 0.3, (count, 2)) for centre in ((0, 0), (5, 0), (0, 5))])


def cluster_affinity(graph: sparse.csr_matrix, first: np.ndarray, second: np.ndarray) -> float:
    """Affinity of two clusters: 1ᵀ W_ab W_ba 1 / |a|² + 1ᵀ W_ba W_ab 1 / |b|².

    Args:
        first, second: indices of the points of clusters a and b.
    """
    ab, ba = graph[first][:, second], graph[second][:, first]
    return float((ab @ ba).sum() / len(first) ** 2 + (ba @ ab).sum() / len(second) ** 2)


def test_affinity_graph_by_hand():
    graph = affinity_graph(np.array([[0.0], [1.0], [3.0]]), 1).toarray()
    # squared distances to the nearest neighbour 1, 1, 4; their mean is 2
    expected = np.zeros((3, 3))
    expected[0, 1] = expected[1, 0] = np.exp(-1 / 2)
    expected[2, 1] = np.exp(-4 / 2)
    np.testing.assert_allclose(graph, expected, rtol=1e-6)


def test_merges_are_those_of_highest_affinity():
    features = np.random.default_rng(1).normal(size=(24, 3))
    graph = affinity_graph(features, 6)
    found = initial_clusters(features)
    while found.max() > 1:  # merge by the definition, one pair at a time, and compare
        groups = [np.flatnonzero(found == c) for c in range(found.max() + 1)]
        pairs = list(itertools.combinations(range(len(groups)), 2))
        best = max(pairs, key=lambda pair: cluster_affinity(graph, groups[pair[0]], groups[pair[1]]))
        expected = {frozenset(g.tolist()) for i, g in enumerate(groups) if i not in best}
        expected.add(frozenset([*groups[best[0]].tolist(), *groups[best[1]].tolist()]))
        merged = merge_clusters(graph, found, len(groups) - 1)
        assert {frozenset(np.flatnonzero(merged == c).tolist()) for c in np.unique(merged)} == expected
        found = merged


def test_many_merges_at_once_are_the_same_as_one_by_one():
    features = np.random.default_rng(2).normal(size=(60, 4))
    graph, start = affinity_graph(features, 8), np.arange(60)
    one = start
    for wanted in range(59, 6, -1):
        one = merge_clusters(graph, one, wanted)
    together = merge_clusters(graph, start, 7)
    assert {tuple(np.flatnonzero(one == c)) for c in range(7)} == {
        tuple(np.flatnonzero(together == c)) for c in range(7)
    }


def test_three_blobs_become_three_clusters():
    features = blobs()
    clusters = merge_clusters(affinity_graph(features, 6), initial_clusters(features), 3)
    assert [len(np.unique(part)) for part in clusters.reshape(3, 12)] == [1, 1, 1] and len(np.unique(clusters)) == 3
    # blobs have no affinity to each other: nothing more is merged
    assert len(np.unique(merge_clusters(affinity_graph(features, 6), clusters, 1))) == 3


def test_nearest_other_clusters():
    clusters = np.repeat([0, 1, 2], 12)
    found = nearest_clusters(blobs() + np.repeat([[0, 0], [-2, 0], [0, 0]], 12, axis=0), clusters, 4)
    assert found[0].tolist() == [1, 2, 1, 2] and found[2].tolist() == [0, 1, 0, 1]


def test_triplet_loss_by_hand():
    a, p = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    n = torch.tensor([[[1.0, 0.0], [0.0, 0.6]]])
    # 2 * 0.25 - 1 + 0.2 < 0 and 2 * 0.25 - 0.36 + 0.2 = 0.34
    assert triplet_loss(a, p, n, positive_weight=2, margin=0.2).item() == pytest.approx(0.34 / 2)


def test_triplets_are_of_the_right_clusters():
    method = Jule(2, num_patches=60, batch_size=40, negatives=2)
    clusters = torch.arange(60) % 4
    others = torch.stack([(clusters + 1) % 4, (clusters + 2) % 4], dim=1)
    torch.manual_seed(0)
    a, p, n = method._draw_triplets(clusters, others)
    assert torch.equal(clusters[a], clusters[p]) and torch.equal(clusters[n], others[a]) and n.shape == (40, 2)


def test_clusters_get_fewer_and_one_training_serves_all_levels(tmp_path):
    volumes = many_halves(3)
    settings = {"num_patches": 80, "epochs": 1, "final_clusters": 8, "batch_size": 20}
    first = Jule(2, **settings)
    first.fit(volumes, tmp_path)
    assert len(first.network.clusters.unique()) == 8
    second = Jule(4, **settings)
    second.fit(volumes, tmp_path)
    assert torch.equal(first.network.clusters, second.network.clusters)
    assert len(np.unique(second.predict(volumes[0]["volume"]))) == 4

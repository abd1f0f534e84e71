"""Agglomerative clustering by directed affinity, as in joint unsupervised learning (Yang et al., CVPR 2016)."""

import numpy as np
from scipy import sparse
from sklearn.neighbors import NearestNeighbors


def affinity_graph(features: np.ndarray, neighbours: int, scale: float = 1.0) -> sparse.csr_matrix:
    """The directed graph W of nearest neighbours.

    W_ij = exp(−‖x_i − x_j‖² / σ²) if j is one of the nearest neighbours of i, with σ² = `scale` times the mean squared
    distance between neighbours; 0 otherwise.

    Args:
        features: (N, F).

    Returns:
        (N, N), `neighbours` entries in each row.
    """
    count = len(features)
    neighbours = min(neighbours, count - 1)
    distances, indices = NearestNeighbors(n_neighbors=neighbours + 1).fit(features).kneighbors(features)
    rows = np.repeat(np.arange(count), neighbours + 1)
    squared, columns = distances.ravel() ** 2, indices.ravel()
    others = rows != columns  # the point itself, wherever it stands among points at distance 0
    graph = sparse.csr_matrix((squared[others], (rows[others], columns[others])), (count, count))
    sigma = scale * graph.data.mean() + 1e-12
    graph.data = np.exp(-graph.data / sigma)
    return graph


def initial_clusters(features: np.ndarray) -> np.ndarray:
    """Clusters (N,) of points that are linked by "j is the nearest neighbour of i"."""
    nearest = affinity_graph(features, 1)
    return sparse.csgraph.connected_components(nearest, directed=False)[1].astype(np.int64)


def merge_clusters(graph: sparse.csr_matrix, clusters: np.ndarray, wanted: int) -> np.ndarray:
    """Merge the two clusters of highest affinity, again and again, until `wanted` are left.

    The affinity of clusters a and b is 1ᵀ W_ab W_ba 1 / |a|² + 1ᵀ W_ba W_ab 1 / |b|².

    Args:
        graph: (N, N) from [`affinity_graph`].
        clusters: (N,) numbers of the present clusters, 0 to C - 1, each of which has a point.
        wanted: number of clusters to end with; more are left if no two clusters have any affinity.

    Returns:
        (N,) numbers of the clusters, 0 to `wanted` - 1.
    """
    count, clusters = int(clusters.max()) + 1, clusters.copy()
    member = sparse.csr_matrix((np.ones(len(clusters)), (clusters, np.arange(len(clusters)))), (count, len(clusters)))
    out = np.asarray((member @ graph).todense(), dtype=np.float32)  # affinity of each cluster to each point
    back = np.asarray((member @ graph.T).todense(), dtype=np.float32)  # and of each point to each cluster
    # terms[a, b] = 1ᵀ W_ab W_ba 1: summed over the points of b
    terms = np.asarray((member @ (out * back).T).T, dtype=np.float64)
    sizes = np.bincount(clusters, minlength=count).astype(np.float64)

    def affinities(a: int) -> np.ndarray:
        found = terms[a] / max(sizes[a], 1) ** 2 + terms[:, a] / np.maximum(sizes, 1) ** 2
        found[(sizes == 0) | (np.arange(count) == a)] = -1
        return found

    table = np.stack([affinities(a) for a in range(count)])
    for _ in range(count - wanted):
        a, b = divmod(int(table.argmax()), count)
        if table[a, b] <= 0:
            break
        out[a] += out[b]
        back[a] += back[b]
        clusters[clusters == b] = a
        terms[:, a] += terms[:, b]
        terms[a] = np.bincount(clusters, weights=out[a] * back[a], minlength=count)
        terms[b] = terms[:, b] = 0
        sizes[a], sizes[b] = sizes[a] + sizes[b], 0
        table[b] = table[:, b] = -1
        table[a] = table[:, a] = affinities(a)
    return np.unique(clusters, return_inverse=True)[1].astype(np.int64)

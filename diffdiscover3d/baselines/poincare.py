"""The Poincaré ball of curvature -1: gyroplanes, the wrapped normal distribution and k-means, on geoopt."""

import math

import torch
from torch import nn

try:
    import geoopt
except ImportError as error:
    raise ValueError("the hyperbolic autoencoder needs geoopt; pip install diffdiscover3d[baselines].") from error

ball = geoopt.PoincareBall(c=1.0)


class Gyroplanes(nn.Module):
    """Signed, scaled distances of points on the ball to hyperplanes (Ganea et al., NeurIPS 2018).

    Args:
        dimension: of the ball.
        count: number of planes.
    """

    def __init__(self, dimension: int, count: int):
        super().__init__()
        self.offsets = nn.Parameter(torch.randn(count, dimension) * 0.1)  # of the planes' points, in the tangent space
        self.normals = nn.Parameter(torch.randn(count, dimension) / math.sqrt(dimension))

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """(N, count) from points (N, dimension)."""
        planes = ball.expmap0(self.offsets)
        return ball.dist2plane(points[:, None], planes[None], self.normals[None], signed=True, scaled=True)


def wrapped_normal_log_density(points: torch.Tensor, means: torch.Tensor, spreads: torch.Tensor) -> torch.Tensor:
    """Log density of the wrapped normal distribution, with respect to the ball's own volume.

    A normal vector with standard deviations `spreads` in the tangent space at the origin is transported to `means` and
    mapped to the ball by the exponential map (Nagano et al., ICML 2019; Mathieu et al., NeurIPS 2019).

    Args:
        points, means: (N, D) on the ball.
        spreads: (N, D).

    Returns:
        (N,).
    """
    origin = torch.zeros_like(means)
    velocity = ball.transp(means, origin, ball.logmap(means, points)) * ball.lambda_x(origin, keepdim=True)
    normal = -(velocity / spreads).square().sum(dim=1) / 2 - spreads.log().sum(dim=1)
    normal = normal - means.shape[1] / 2 * math.log(2 * math.pi)
    distance = ball.dist(means, points).clamp(min=1e-6)
    stretch = distance + torch.log1p(-torch.exp(-2 * distance)) - math.log(2) - distance.log()  # log(sinh(r) / r)
    return normal - (means.shape[1] - 1) * stretch


def poincare_kmeans(
    points: torch.Tensor, clusters: int, seed: int = 0, restarts: int = 3, iterations: int = 50
) -> torch.Tensor:
    """k-means on the ball: nearest centre by the ball's distance, centres are gyromidpoints.

    Args:
        points: (N, D) float64 on the ball.
        clusters: number of centres.
        restarts: starts from k-means++; the one with the smallest sum of squared distances counts.
        iterations: at most, in each start.

    Returns:
        (clusters, D) centres.
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = None, math.inf
    for _ in range(restarts):
        centres = _spread_centres(points, clusters, generator)
        labels = None
        for _ in range(iterations):
            distances = ball.dist(points[:, None], centres[None])
            nearest = distances.argmin(dim=1)
            if labels is not None and torch.equal(nearest, labels):
                break
            labels = nearest
            centres = torch.stack(
                [
                    ball.weighted_midpoint(points[labels == k]) if (labels == k).any() else centres[k]
                    for k in range(clusters)
                ]
            )
        inertia = ball.dist(points[:, None], centres[None]).min(dim=1).values.square().sum().item()
        if inertia < least:
            best, least = centres, inertia
    return best


def _spread_centres(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Centres by k-means++: each next one with a probability in proportion to the squared distance to the others."""
    chosen = [points[torch.randint(len(points), (), generator=generator)]]
    while len(chosen) < clusters:
        squared = ball.dist(points[:, None], torch.stack(chosen)[None]).min(dim=1).values.square()
        squared = squared + 1e-12
        # torch.multinomial takes at most 2^24 categories
        place = torch.rand((), generator=generator, dtype=points.dtype) * squared.sum()
        chosen.append(points[int(torch.searchsorted(squared.cumsum(0), place).clamp(max=len(points) - 1))])
    return torch.stack(chosen)

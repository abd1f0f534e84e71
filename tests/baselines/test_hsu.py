"""The hyperbolic autoencoder: distances, densities and clusters on the Poincaré ball."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("geoopt")

from diffdiscover3d.baselines.hsu import Hsu, HyperbolicVAE, draw_families, resample
from diffdiscover3d.baselines.poincare import Gyroplanes, ball, poincare_kmeans, wrapped_normal_log_density
from tests.baselines.toys import many_halves


def random_points(count: int, radius: float = 0.95, seed: int = 0) -> torch.Tensor:
    """Points of the disk in float64."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    length = radius * torch.rand(count, generator=generator, dtype=torch.float64).sqrt()
    return torch.stack([length * angle.cos(), length * angle.sin()], dim=1)


def test_distance_is_the_poincare_distance():
    x, y = random_points(50), random_points(50, seed=1)
    squared = (x - y).square().sum(dim=1)
    curved = (1 - x.square().sum(dim=1)) * (1 - y.square().sum(dim=1))
    torch.testing.assert_close(ball.dist(x, y), torch.acosh(1 + 2 * squared / curved), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mean", [(0.0, 0.0), (0.4, -0.3)])
def test_wrapped_normal_density_integrates_to_one(mean):
    side = torch.linspace(-0.9995, 0.9995, 1200, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    points = grid[grid.norm(dim=1) < 0.9995]
    means = torch.tensor(mean, dtype=torch.float64).expand(len(points), 2)
    spreads = torch.tensor([0.5, 0.8], dtype=torch.float64).expand(len(points), 2)
    density = wrapped_normal_log_density(points, means, spreads).exp()
    volume = (2 / (1 - points.square().sum(dim=1))) ** 2  # of the ball, per unit of the plane
    total = (density * volume).sum() * (side[1] - side[0]) ** 2
    assert total.item() == pytest.approx(1, abs=0.01)


def test_gyroplanes_are_signed_distances_to_hyperplanes():
    layer = Gyroplanes(2, 1).double()
    with torch.no_grad():
        layer.offsets.zero_()
        layer.normals.copy_(torch.tensor([[0.0, 3.0]]))
    on, above = torch.tensor([[0.5, 0.0], [-0.9, 0.0]]), torch.tensor([[0.0, 0.5], [0.0, -0.5]])
    assert layer(on.double()).abs().max() < 1e-9
    # through the origin, the distance to the plane is the one to the origin: 2 artanh(1/2); scaled by the normal's 3
    expected = torch.tensor([[1.0], [-1.0]]).double() * 2 * math.atanh(0.5) * 3
    torch.testing.assert_close(layer(above.double()), expected)


def test_poincare_kmeans_finds_groups_near_the_rim():
    angles = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    middles = 0.95 * torch.stack([angles.cos(), angles.sin()], dim=1)
    points = ball.projx(middles.repeat_interleave(30, dim=0) + 0.01 * random_points(90))
    centres = poincare_kmeans(points, 3, seed=0)
    labels = ball.dist(points[:, None], centres[None]).argmin(dim=1).reshape(3, 30)
    assert (labels == labels[:, :1]).all() and len(labels[:, 0].unique()) == 3
    # a centre lies in the middle of its points: a pair of points that mirror each other has the origin
    pair = torch.tensor([[0.6, 0.2], [-0.6, -0.2]], dtype=torch.float64)
    assert poincare_kmeans(pair, 1).abs().max() < 1e-9


def test_children_lie_inside_their_parents_and_others_elsewhere():
    ramps = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in (30, 34, 28)), indexing="ij"))
    torch.manual_seed(0)
    found = [[], [], []]
    for axis in range(3):  # a volume of coordinates tells where a patch was
        torch.manual_seed(0)
        families = draw_families([{"volume": ramps[axis][None]}], 64, 8, 2.0)
        for places, patches in zip(found, families, strict=True):
            places.append(patches.flatten(1))
    (p_low, p_high), (c_low, c_high), (o_low, o_high) = (
        (torch.stack([x.amin(dim=1) for x in places]), torch.stack([x.amax(dim=1) for x in places])) for places in found
    )
    assert (c_low >= p_low - 0.51).all() and (c_high <= p_high + 0.51).all()
    inside = ((o_low >= p_low) & (o_high <= p_high)).all(dim=0)
    assert inside.sum() == 0
    widths = p_high - p_low
    assert widths.min() >= 8 * 7 / 8 - 0.01 and widths.max() <= 16 and widths.std() > 1


def test_resampled_patches_are_the_voxels_themselves():
    volume = torch.rand(1, 9, 8, 7)
    patch = resample(volume, torch.tensor([[4.0, 3.0, 5.0]]), torch.tensor([[4.0]]), 4)
    torch.testing.assert_close(patch[0, 0], volume[0, 2:6, 1:5, 3:7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_the_decoder_mirrors_the_encoder(preset):
    config = Hsu(2, preset=preset).config
    network = HyperbolicVAE(config)
    patches = torch.rand(2, 1, *[config.patch] * 3)
    means, spreads = network(patches)
    assert means.shape == spreads.shape == (2, config.latent) and (means.norm(dim=1) < 1).all()
    assert network.decode(means).shape == patches.shape


def test_training_brings_children_nearer_than_others():
    volumes = many_halves(3, noise=0.02)
    method = Hsu(2, steps=60, batch_size=16, parent_scale=1.5, learning_rate=2e-3)

    def order(network):
        torch.manual_seed(3)
        with torch.no_grad():
            p, c, o = (network(x)[0] for x in draw_families(volumes, 200, 9, 1.5))
        return (ball.dist(p, c) < ball.dist(p, o)).float().mean().item()

    before = order(method.seeded(lambda: HyperbolicVAE(method.config)))
    method.fit(volumes)
    assert order(method.network) > max(0.55, before)
    assert np.unique(method.predict(volumes[0]["volume"])).tolist() == [0, 1]

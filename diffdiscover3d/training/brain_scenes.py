"""Scenes for `brain-flair`: brain scans bent, recoloured and given lesions of random shape, drawn twice.

A scene has two renderings. In the conspicuous one implanted lesions are far brighter than any tissue, so that a plain
clustering finds them; in the realistic one they look like lesions: textured, sometimes hardly brighter than cortex,
with dark cores, under a bias field, noise and blur. The network sees the realistic rendering; its targets are
assignments computed from the conspicuous one (`assignments.py`). Masks of implants are not returned.

Everything is drawn on the device of the scans, for a batch at once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffdiscover3d.data.foreground import robust_scale

MEDIAN = 0.5  # about where robust scaling puts the median of a brain
CONSPICUOUS = 2.0  # value of implants in the conspicuous rendering; tissue lies in [0, 1]
_KNOTS = (0.0, 0.05, 0.2, 0.35, 0.45, 0.55, 0.65, 0.8, 1.0)  # of the tone curve
_STEPS = tuple(torch.tensor(_KNOTS).diff().tolist())  # in float32


@dataclass(frozen=True)
class SceneOptions:
    """Ranges from which scenes are drawn; lengths are shares of half the frame's side.

    Attributes:
        implants: probabilities of 0, 1, 2 and 3 large implants.
        spots: probability of many small ones.
        radius: of large implants, log-uniform.
        contrast: brightness above the median tissue of an implant's mean.
        core: probability that an implant has a core of another brightness.
        cut: probability that the field of view cuts off a part of the brain.
        bias, noise, blur: largest strength of the bias field (log), the noise, and the blur (voxels).
        slices: probability of thick slices.
    """

    implants: Sequence[float] = (0.3, 0.45, 0.17, 0.08)
    spots: float = 0.25
    radius: tuple[float, float] = (0.06, 0.55)
    contrast: tuple[float, float] = (0.15, 0.6)
    core: float = 0.45
    cut: float = 0.15
    bias: float = 0.25
    noise: float = 0.05
    blur: float = 1.1
    slices: float = 0.4


@dataclass
class Scene:
    """A batch of scenes, all (B, 1, H, W, D).

    Attributes:
        view: the realistic rendering, scaled as [`robust_scale`] does.
        conspicuous: the conspicuous rendering; tissue in [0, 1], zero in the background.
        foreground: bool.
        carried: the scan's own assignment, moved along with it; zero where the scan's own lesions were smoothed away.
    """

    view: torch.Tensor
    conspicuous: torch.Tensor
    foreground: torch.Tensor
    carried: torch.Tensor


def draw_scene(
    tissue: torch.Tensor,
    foreground: torch.Tensor,
    carried: torch.Tensor,
    generator: torch.Generator,
    options: SceneOptions | None = None,
) -> Scene:
    """Draw a scene from each scan of a batch.

    Args:
        tissue: (B, 1, H, W, D) robustly scaled scans in their frames.
        foreground: (B, 1, H, W, D) float, 1 in the brain.
        carried: (B, 1, H, W, D) float assignment of each scan, 1 in bright outliers.
        generator: on the device of the scans.
    """
    draw = _Draw(generator, len(tissue), tuple(tissue.shape[2:]), options or SceneOptions())
    centres, radii = draw.places()
    points = draw.frame_points()
    moved = _warp(torch.cat([tissue, foreground, carried], dim=1), draw.source_points(points, centres[0], radii[0]))
    brain = (moved[:, 1:2] > 0.5) & draw.field_of_view(points)
    inside = brain.to(tissue.dtype)
    t = draw.tone(moved[:, :1]) * inside

    fine, middle, coarse = draw.noise(26), draw.noise(13), draw.noise(6)
    plain, realistic = t, t
    for slot in range(len(centres)):
        soft, depth = draw.implant(points, centres[slot], radii[slot], t, inside, (fine, middle, coarse))
        realistic = torch.lerp(realistic, draw.lesion(t, depth, fine, middle), soft)
        plain = torch.lerp(plain, CONSPICUOUS + 0.2 * fine.clamp(-1, 1), soft)
        fine, middle, coarse = (x.flip(2).roll(7, 3) for x in (fine, middle, coarse))  # other lesions, other textures
    soft = draw.spots(t, inside)
    realistic = torch.lerp(realistic, draw.lesion(t, torch.full_like(t, -1.0), fine, middle), soft)
    plain = torch.lerp(plain, CONSPICUOUS + 0.2 * fine.clamp(-1, 1), soft)

    view = draw.acquire(realistic, inside)
    return Scene(
        robust_scale(view, brain, check=False), plain * inside, brain, (moved[:, 2:] > 0.5).to(t.dtype) * inside
    )


def acquire_again(view: torch.Tensor, foreground: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another acquisition of the same brains: other contrast, shading, blur and noise; scaled again.

    Args:
        view, foreground: of a scene.
        generator: on their device.
    """
    draw = _Draw(generator, len(view), tuple(view.shape[2:]), SceneOptions())
    inside = foreground.to(view.dtype)
    return robust_scale(draw.acquire(draw.tone(view), inside), foreground, check=False)


class _Draw:
    """The random choices of a batch of scenes."""

    def __init__(self, generator: torch.Generator, batch: int, grid: tuple[int, int, int], options: SceneOptions):
        self.generator, self.batch, self.grid, self.options = generator, batch, grid, options
        self.device = generator.device

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """(B, *shape) or, without a shape, (B, 1, 1, 1, 1)."""
        shape = shape or (1, 1, 1, 1)
        return low + (high - low) * torch.rand((self.batch, *shape), generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn((self.batch, *shape), generator=self.generator, device=self.device)

    def happens(self, probability: float) -> torch.Tensor:
        """(B, 1, 1, 1, 1), 1 or 0."""
        return (self.uniform(0, 1) < probability).float()

    def noise(self, nodes: int, channels: int = 1) -> torch.Tensor:
        """Smooth noise of about unit variance, with about `nodes` independent values along an axis."""
        white = self.normal(channels, nodes, nodes, nodes)
        smooth = F.interpolate(white, size=self.grid, mode="trilinear", align_corners=True)
        return smooth * 1.7  # trilinear interpolation leaves about a third of the variance

    def places(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Centres (B, 3, 1, 1, 1) and radii (B, 1, 1, 1, 1) of three large implants; a radius of 0: there is none."""
        options, (low, high) = self.options, self.options.radius
        count = torch.multinomial(
            _constant(tuple(options.implants), self.device), self.batch, replacement=True, generator=self.generator
        ).view(-1, 1, 1, 1, 1)
        centres, radii = [], []
        for slot in range(3):
            direction = self.normal(3)
            direction = direction / direction.norm(dim=1, keepdim=True)
            away = self.uniform(0, 1, 1) ** 0.5 * 0.75
            centres.append((direction * away).view(-1, 3, 1, 1, 1))
            radius = low * (high / low) ** self.uniform(0, 1)
            radii.append(radius * (count > slot))
        return centres, radii

    def frame_points(self) -> torch.Tensor:
        """(1, 3, H, W, D) coordinates in [-1, 1]."""
        axes = [torch.linspace(-1, 1, n, device=self.device) for n in self.grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]

    def source_points(self, points: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """Where in the scan each point of the frame is taken from, (B, 3, H, W, D)."""
        # a field of view that cuts the brain: the frame then spans only a part of the scan
        self._low, self._high = (self._cut(-1.0), self._cut(1.0))
        inner = 0.94  # a frame keeps a margin around the brain
        shown = (points / inner + 1) / 2 * (self._high - self._low) + self._low
        shown = torch.where((self._high - self._low) < 1.999, shown, points)
        angles = self.normal(3) * 0.12
        matrix = torch.linalg.matrix_exp(_skew(angles)) * (1 + 0.05 * self.normal(1, 3))
        mirrored = torch.ones(self.batch, 3, 1, device=self.device)
        mirrored[:, :1] = 1 - 2 * (self.uniform(0, 1, 1, 1) < 0.5).float()
        out = torch.einsum("bij,bjhwd->bihwd", matrix * mirrored, shown.expand(self.batch, -1, -1, -1, -1))
        bend = self.noise(5, 3) * 0.025 * self.uniform(0, 1) + self.noise(9, 3) * 0.008 * self.uniform(0, 1)
        # mass effect: tissue around a large implant is pushed away from its centre
        offset = points - centre
        distance = offset.square().sum(dim=1, keepdim=True)
        reach = (1.6 * radius).clamp(min=1e-3)
        push = self.uniform(0, 0.35) * torch.exp(-distance / reach.square()) * (radius > 0)
        return out + bend - push * offset

    def _cut(self, side: float) -> torch.Tensor:
        """(B, 3, 1, 1, 1), where the field of view ends on one side: mostly at `side`, at times well within."""
        happens = self.uniform(0, 1, 3) < self.options.cut / 3
        return (side * torch.where(happens, self.uniform(0.3, 0.85, 3), torch.ones(1, device=self.device))).view(
            -1, 3, 1, 1, 1
        )

    def field_of_view(self, points: torch.Tensor) -> torch.Tensor:
        """(B, 1, H, W, D) bool, false beyond the sides on which the brain is cut off."""
        low, high = self._low > -0.999, self._high < 0.999
        beyond = (low & (points < -0.94)) | (high & (points > 0.94))
        return ~beyond.any(dim=1, keepdim=True)

    def tone(self, t: torch.Tensor) -> torch.Tensor:
        """A random increasing curve over the intensities of the tissue."""
        steps = _constant(_STEPS, self.device)
        slopes = torch.exp(0.45 * self.normal(len(steps)))
        # at times grey and white matter differ much less than in the scans
        slopes[:, 2:6] *= self.uniform(0.25, 1.2, 1)
        slopes = slopes / (slopes * steps).sum(dim=1, keepdim=True)
        out = torch.zeros_like(t)
        for k, step in enumerate(_STEPS):
            out = out + slopes[:, k].view(-1, 1, 1, 1, 1) * (t - _KNOTS[k]).clamp(0, step)
        return out

    def implant(self, points, centre, radius, t, inside, noises) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft extent (B, 1, H, W, D) of one implant in [0, 1], and its level-set function, negative inside."""
        fine, middle, coarse = noises
        axes = torch.linalg.matrix_exp(_skew(self.normal(3))) * torch.exp(0.25 * self.normal(3, 1))
        away = torch.einsum("bij,bjhwd->bihwd", axes, points - centre)
        distance = away.square().sum(dim=1, keepdim=True).sqrt()
        depth = distance / radius.clamp(min=1e-3) - 1
        # infiltration: fingers and lobes, most of them along the noise of the implant's own scale
        large = (radius / 0.3).clamp(0, 1)
        depth = depth + self.uniform(0, 0.45) * coarse * large + self.uniform(0, 0.35) * middle * large
        depth = depth + self.uniform(0, 0.15) * fine
        # fluid is spared, cortex often
        fluid = ((0.3 - t) / 0.15).clamp(0, 1)
        cortex = ((t - MEDIAN) / 0.15).clamp(0, 1)
        depth = depth + self.uniform(0, 1.5) * fluid + self.uniform(0, 0.5) * cortex
        softness = self.uniform(0.6, 2.5) / min(self.grid) * 2  # in voxels
        soft = torch.sigmoid(-depth * radius / softness * 2) * inside * (radius > 0)
        return soft, depth

    def lesion(self, t, depth, fine, middle) -> torch.Tensor:
        """The realistic brightness of a lesion that covers everything."""
        low, high = self.options.contrast
        above = self.uniform(low, high)
        texture = 1 + self.uniform(0, 0.35) * middle + self.uniform(0, 0.25) * fine
        median = self._median(t)
        value = median + above * texture + self.uniform(0, 0.7) * (t - median)
        # a core of another brightness, from fluid to brighter than the rest
        core = torch.sigmoid((-depth - self.uniform(0.25, 0.7) + 0.25 * middle) * 12) * self.happens(self.options.core)
        return torch.lerp(value, self.uniform(0.05, 1.0) + 0.1 * fine, core).clamp(min=0.03)

    def _median(self, t: torch.Tensor) -> torch.Tensor:
        """About the median of the tissue: the mean of what is not fluid."""
        solid = (t > 0.25).float()
        return ((t * solid).sum(dim=(2, 3, 4)) / solid.sum(dim=(2, 3, 4)).clamp(min=1)).view(-1, 1, 1, 1, 1)

    def spots(self, t: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Many small lesions in deep tissue: soft extent (B, 1, H, W, D)."""
        field = self.noise(22) + 0.5 * self.noise(11)
        deep = _blur(inside, 4.0)
        near_fluid = _blur(((0.3 - t) / 0.15).clamp(0, 1) * deep.pow(4), 3.0)
        field = field + self.uniform(0, 5) * near_fluid - 6 * (1 - deep) - 3 * ((0.3 - t) / 0.15).clamp(0, 1)
        flat = field.flatten(1)[:, ::97]
        share = 0.0006 * 20 ** self.uniform(0, 1, 1)
        rank = ((1 - share) * flat.shape[1]).long().clamp(max=flat.shape[1] - 1)
        level = flat.sort(dim=1).values.gather(1, rank).view(-1, 1, 1, 1, 1)
        return torch.sigmoid((field - level) * 5) * inside * self.happens(self.options.spots)

    def acquire(self, t: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Shading, remnants at the brain's surface, blur, slices and noise."""
        options = self.options
        symmetric = self.noise(7)
        symmetric = (symmetric + symmetric.flip(2)) / 1.4
        shading = self.noise(4) * self.uniform(0, options.bias) + symmetric * self.uniform(0, 0.1)
        surface = inside * (1 - _blur(inside, 1.5)).clamp(min=0) * 2 * (self.noise(9) > 0.6)
        t = t * torch.exp(shading) + surface * self.uniform(-0.2, 0.6)
        sigma = float(torch.rand((), generator=self.generator, device=self.device)) * options.blur
        t = _blur(t, sigma)
        if float(torch.rand((), generator=self.generator, device=self.device)) < options.slices:
            axis = int(torch.randint(3, (), generator=self.generator, device=self.device))
            size = list(self.grid)
            size[axis] = size[axis] // int(torch.randint(2, 5, (), generator=self.generator, device=self.device))
            thick = F.interpolate(t, size=size, mode="area")
            t = F.interpolate(thick, size=self.grid, mode="trilinear", align_corners=False)
        white = self.normal(1, *self.grid)
        return (t + self.uniform(0, options.noise) * white).clamp(min=0) * inside


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A tensor that is copied to a GPU once, since the host waits for the copy."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def _warp(volume: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Take a (B, C, H, W, D) volume at (B, 3, H, W, D) points in [-1, 1]; zero beyond it."""
    grid = points.movedim(1, -1).flip(-1)  # grid_sample wants the last axis first
    return F.grid_sample(volume, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _skew(v: torch.Tensor) -> torch.Tensor:
    """(B, 3, 3) antisymmetric matrices of (B, 3) vectors; their exponentials are rotations."""
    x, y, z = v.unbind(dim=1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).view(-1, 3, 3)


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (B, 1, H, W, D), zero beyond the volume."""
    if sigma < 0.05:
        return x
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in (2, 3, 4):
        shape, pad = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[axis], pad[axis - 2] = len(kernel), radius
        x = F.conv3d(x, kernel.view(shape), padding=pad)
    return x

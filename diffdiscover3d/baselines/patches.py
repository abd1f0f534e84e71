"""Encoders of voxel-centred patches that can be run densely over a whole volume."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

_SLAB_VOXELS = 400_000  # dense features are computed for about so many voxels at once


class PatchEncoder(nn.Module):
    """Convolutions, optional 2³ max pooling, and a linear layer: a cubic patch in, a feature vector out.

    Args:
        kernels: sides of the convolutions' kernels, stride 1.
        channels: their output channels.
        features: length of the output.
        size: side of a patch.
        pool: max-pool by 2 after the last convolution.
        norm: batch normalisation after every convolution.
        dropout: probability, after every convolution.
        paddings: zeros around each convolution's input; default: none. Only without them can features of all voxels
            be computed at once.

    Raises:
        ValueError: if the kernels leave nothing of a patch.
    """

    def __init__(
        self,
        kernels: Sequence[int],
        channels: Sequence[int],
        features: int,
        size: int,
        pool: bool = False,
        norm: bool = False,
        dropout: float = 0.0,
        paddings: Sequence[int] | None = None,
    ):
        super().__init__()
        paddings = tuple(paddings or [0] * len(kernels))
        side = size - sum(k - 1 - 2 * p for k, p in zip(kernels, paddings, strict=True))
        side = side // 2 if pool else side
        if side < 1:
            raise ValueError(f"kernels {tuple(kernels)} leave nothing of patches of side {size}.")
        layers: list[nn.Module] = []
        for before, after, kernel, padding in zip((1, *channels), channels, kernels, paddings, strict=False):
            layers.append(nn.Conv3d(before, after, kernel, padding=padding))
            if norm:
                layers.append(nn.BatchNorm3d(after))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.size, self.side, self.pool, self.is_dense = size, side, pool, not any(paddings)
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Conv3d(channels[-1], features, side)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Features (N, F) of patches (N, 1, size, size, size)."""
        x = self.convolutions(patches)
        if self.pool:
            x = F.max_pool3d(x, 2)
        return self.linear(x[..., : self.side, : self.side, : self.side]).flatten(1)

    def dense(self, volume: torch.Tensor) -> torch.Tensor:
        """Features (1, F, H, W, D) of the patch around every voxel of a (1, 1, H, W, D) volume.

        The volume is extended by repeating its borders. Pooling has stride 1 and the linear layer is dilated instead,
        which gives the same numbers as encoding each patch for itself.
        """
        if not self.is_dense:
            return self._one_by_one(volume)
        x = self.convolutions(self._extended(volume))
        if self.pool:
            x = F.max_pool3d(x, 2, stride=1)
        dilation = 2 if self.pool else 1
        h, w, d = volume.shape[2:]
        return F.conv3d(x, self.linear.weight, self.linear.bias, dilation=dilation)[:, :, :h, :w, :d]

    def _extended(self, volume: torch.Tensor) -> torch.Tensor:
        before = self.size // 2
        return F.pad(volume, (before, self.size - 1 - before) * 3, mode="replicate")

    def _one_by_one(self, volume: torch.Tensor, batch: int = 2048) -> torch.Tensor:
        """As `dense`, with every patch encoded for itself."""
        windows = self._extended(volume)[0, 0].unfold(0, self.size, 1).unfold(1, self.size, 1).unfold(2, self.size, 1)
        grid = windows.shape[:3]
        found = []
        for voxels in torch.arange(grid.numel()).split(batch):
            rows = torch.unravel_index(voxels, grid)
            found.append(self(windows[rows][:, None]))
        return torch.cat(found).T.reshape(1, -1, *grid)


@torch.no_grad()
def encode_volume(encoder: PatchEncoder, volume: torch.Tensor, transform=None) -> torch.Tensor:
    """Features of every voxel, computed slab by slab.

    Args:
        encoder: in evaluation mode.
        volume: (1, H, W, D).
        transform: applied to (voxels, F) features of each slab.

    Returns:
        (H·W·D, F') on the CPU.
    """
    device = next(encoder.parameters()).device
    margin, (h, w, d) = encoder.size, volume.shape[1:]
    rows = max(1, _SLAB_VOXELS // (w * d))
    found = []
    for start in range(0, h, rows):
        low, high = max(0, start - margin), min(h, start + rows + margin)
        slab = encoder.dense(volume[None, :, low:high].to(device))[0]
        inside = slab[:, start - low : start - low + min(rows, h - start)].flatten(1).T
        found.append((inside if transform is None else transform(inside)).cpu())
    return torch.cat(found)


def draw_patches(volumes: Sequence[dict], count: int, size: int, num_volumes: int = 8) -> torch.Tensor:
    """Random patches (count, 1, size, size, size), lying inside of a few random volumes.

    Draws from the global generator.
    """
    chosen = torch.randint(len(volumes), (min(num_volumes, count),)).tolist()
    shares = [count // len(chosen) + (i < count % len(chosen)) for i in range(len(chosen))]
    return torch.cat([draw_from(volumes[i]["volume"], share, size)[0] for i, share in zip(chosen, shares, strict=True)])


def draw_from(volume: torch.Tensor, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patches (count, 1, size, size, size) of one (1, H, W, D) volume, and their corners (count, 3).

    Raises:
        ValueError: if the volume is smaller than a patch.
    """
    extent = torch.tensor(volume.shape[1:])
    if extent.min() < size:
        raise ValueError(f"a volume of shape {tuple(volume.shape[1:])} is smaller than a patch of side {size}.")
    corners = (torch.rand(count, 3) * (extent - size + 1)).long()
    windows = volume[0].unfold(0, size, 1).unfold(1, size, 1).unfold(2, size, 1)
    return windows[corners[:, 0], corners[:, 1], corners[:, 2]][:, None], corners

"""The three label-free losses of the paper, Eq. 5 to 8.

With M the masks, h a representation of the volume and z_k the mean of h in part k, Eq. 5 is

    C(h) = 1/N sum_k sum_u M_ku |z_k - h_u|^2 = 1/N (sum_u |h_u|^2 - sum_k |sum_u M_ku h_u|^2 / m_k),  m_k = sum_u M_ku

because the masks sum to one. Features live on a coarse grid f and reach the voxels by a linear interpolation, h = U f.
So sum_u M_ku h_u = f (U^T M_k): the adjoint of the interpolation is applied to the K masks, and never the
interpolation to the channels. U is one small matrix per axis, which makes U^T M_k and U^T U f three small matrix
products each. C does not change when a constant is added to h; the channel means are subtracted first, or the
difference above would cancel badly in float32.
"""

import functools
from collections.abc import Sequence

import torch


def region_consistency(
    masks: torch.Tensor,
    features: torch.Tensor | Sequence[torch.Tensor],
    extent: Sequence[int] | None = None,
    relative: bool = False,
    within: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean within-part variance of features (Eq. 5), without upsampling them.

    Args:
        masks: (B, K, H, W, D) soft parts, summing to 1 over K.
        features: (B, C, h, w, d) on any grid, usually a coarser one, interpolated linearly with corners aligned; or
            several of them, which count as their concatenation.
        extent: the grid of voxels the features span, where it exceeds that of the masks at the far ends (volumes
            padded by the UNet); default: the masks' own.
        relative: divide by the variance of the whole volume, so that the result is the share of variance the parts
            leave unexplained, in [0, 1]; several features are then averaged.
        within: (B, P, H, W, D) coarser parts which the masks divide further. What these leave unexplained takes the
            place of the variance of the whole volume; only with `relative`.

    Returns:
        Scalar, averaged over the batch; float32, or float64 for float64 masks.

    Raises:
        ValueError: if batch sizes differ, the extent is smaller than the masks' grid, or `within` is not relative.
    """
    if within is not None and not relative:
        raise ValueError("`within` is given and `relative` is False; coarser parts only matter to the relative loss.")
    if isinstance(features, torch.Tensor):
        features = (features,)
    if not features:
        raise ValueError("`features` is empty: give one or more feature maps.")
    grid = tuple(masks.shape[2:])
    extent = grid if extent is None else tuple(extent)
    if any(e < n for e, n in zip(extent, grid, strict=True)):
        raise ValueError(f"`extent` must be at least the masks' grid {grid}, got {extent}.")

    with torch.autocast(masks.device.type, enabled=False):
        masks = masks if masks.dtype == torch.float64 else masks.float()
        if within is not None:
            within = within.detach().to(masks.dtype)
        terms = [_consistency(masks, f.to(masks.dtype), extent, relative, within) for f in features]
        total = torch.stack(terms).sum(dim=0)
        return (total / len(terms) if relative else total).mean()


def photometric_invariance(masks: torch.Tensor, masks_changed: torch.Tensor) -> torch.Tensor:
    """Soft Dice distance between the parts of a volume and of its photometric change (Eq. 8).

    Args:
        masks, masks_changed: (B, K, H, W, D) soft parts.

    Returns:
        Scalar in [0, 1], averaged over the batch.
    """
    if masks.shape != masks_changed.shape:
        raise ValueError(f"both must have one shape, got {tuple(masks.shape)} and {tuple(masks_changed.shape)}.")
    a, b = masks.flatten(1).float(), masks_changed.flatten(1).float()
    return (1 - 2 * (a * b).sum(dim=1) / (a.square().sum(dim=1) + b.square().sum(dim=1))).mean()


@functools.lru_cache(maxsize=64)
def interpolation_matrix(
    coarse: int, extent: int, fine: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Linear interpolation along one axis with corners aligned, as a matrix.

    Kept between calls, which a training makes with the same sizes at every step; must not be changed in place.

    Returns:
        (fine, coarse): row i holds the weights of voxel i, of the first `fine` of `extent` voxels, on the coarse grid.
    """
    with torch.inference_mode(False):  # a tensor made in that mode would be of no use to a later training
        if coarse == 1:
            return torch.ones(fine, 1, dtype=dtype, device=device)
        position = torch.arange(fine, dtype=torch.float64) * ((coarse - 1) / (extent - 1))
        nodes = torch.arange(coarse, dtype=torch.float64)
        return (1 - (position[:, None] - nodes[None, :]).abs()).clamp(min=0).to(device, dtype)


def _consistency(masks, features, extent, relative, within) -> torch.Tensor:
    """Eq. 5 for one feature map, for each volume of the batch: (B,)."""
    grid, coarse = masks.shape[2:], features.shape[2:]
    if features.ndim != 5 or features.shape[0] != masks.shape[0]:
        raise ValueError(
            f"`features` must be (batch, channel, h, w, d) for {masks.shape[0]} volumes, got {tuple(features.shape)}."
        )
    level = features.square().mean(dim=(2, 3, 4)).sum(dim=1)
    features = features - features.mean(dim=(2, 3, 4), keepdim=True)
    voxels = grid[0] * grid[1] * grid[2]
    matrices = None
    if tuple(coarse) != tuple(grid) or tuple(grid) != extent:
        sizes = zip(coarse, extent, grid, strict=True)
        matrices = [interpolation_matrix(c, e, n, masks.device, masks.dtype) for c, e, n in sizes]
    spread = features if matrices is None else _apply_along_axes(features, [m.T @ m for m in matrices])  # U^T U f
    energy = (features * spread).sum(dim=(1, 2, 3, 4))

    sums, explained = _explained(masks, features, matrices)
    unexplained = energy - explained
    if not relative:
        return unexplained / voxels
    if within is None:
        mean = sums.detach().sum(dim=2) / voxels  # the masks sum to one: their sums add up to sum_u h_u
        variance = energy - voxels * mean.square().sum(dim=1)
    else:
        variance = energy - _explained(within, features, matrices)[1]
    # features without variance leave nothing to explain; what rounding makes of that must not be divided by
    rounding = (4 * torch.finfo(variance.dtype).eps) ** 2 * voxels * level
    return unexplained / torch.maximum(variance, rounding).clamp(min=torch.finfo(variance.dtype).tiny)


def _explained(masks, features, matrices) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_u M_ku h_u for every channel and part, (B, C, K), and sum_k |sum_u M_ku h_u|^2 / m_k, (B,)."""
    on_coarse = masks if matrices is None else _apply_along_axes(masks, matrices)  # U^T M
    sums = features.flatten(2) @ on_coarse.flatten(2).transpose(1, 2)
    sizes = masks.sum(dim=(2, 3, 4)).clamp(min=torch.finfo(masks.dtype).tiny)
    return sums, (sums.square().sum(dim=1) / sizes).sum(dim=1)


def _apply_along_axes(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract the three grid axes of (B, C, H, W, D) with one (old, new) matrix each, last axis first."""
    for axis, matrix in zip((4, 3, 2), reversed(matrices), strict=True):
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x

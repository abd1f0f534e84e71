"""The three label-free losses of the paper, Eq. 5 to 8, and what this package adds: space, smoothness, assignments.

With M the masks, h a representation of the volume and z_k the mean of h in part k, Eq. 5 is

    C(h) = 1/N sum_k sum_u M_ku |z_k - h_u|^2 = 1/N (sum_u |h_u|^2 - sum_k |sum_u M_ku h_u|^2 / m_k),  m_k = sum_u M_ku

because the masks sum to one. The features f are defined on a coarse grid and interpolated linearly to the voxels,
h = U f. Hence sum_u M_ku h_u = f (U^T M_k): instead of upsampling all channels, the adjoint of the interpolation is
applied to the K masks. U is separable into one small matrix per axis, so U^T M_k and U^T U f are three small matrix
products each. C is invariant to adding a constant to h; the channel means are subtracted first to avoid cancellation in
float32.
"""

import functools
import itertools
import math
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
        features: (B, C, h, w, d) on any grid, usually a coarser one, interpolated linearly with aligned corners. A
            sequence of feature maps is treated as their concatenation.
        extent: voxel grid spanned by the features. It may exceed the grid of the masks at the far ends if the UNet
            padded the volume. Default: the grid of the masks.
        relative: divide by the variance of the whole volume, so that the result is the fraction of variance not
            explained by the parts, in [0, 1]. With several feature maps, the fractions are averaged.
        within: (B, P, H, W, D) coarser parts that the masks subdivide. The variance within these parts replaces the
            variance of the whole volume as the divisor. Requires `relative`.

    Returns:
        Scalar, averaged over the batch; float32, or float64 for float64 masks.

    Raises:
        ValueError: if there is no feature map, one is not 5-D or has another batch size than the masks, the extent is
            smaller than the masks' grid, or `within` is given without `relative`.
    """
    if within is not None and not relative:
        raise ValueError("`within` is given and `relative` is False; coarser parts affect only the relative loss.")
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
    """Soft Dice distance between the parts of a volume and of its photometrically changed copy (Eq. 8).

    Args:
        masks, masks_changed: (B, K, H, W, D) soft parts.

    Returns:
        Scalar in [0, 1], averaged over the batch.

    Raises:
        ValueError: if the shapes differ.
    """
    if masks.shape != masks_changed.shape:
        raise ValueError(
            f"the masks must have the same shape, got {tuple(masks.shape)} and {tuple(masks_changed.shape)}."
        )
    a, b = masks.flatten(1).float(), masks_changed.flatten(1).float()
    return (1 - 2 * (a * b).sum(dim=1) / (a.square().sum(dim=1) + b.square().sum(dim=1))).mean()


def spatial_consistency(
    masks: torch.Tensor, families: Sequence[Sequence[int]], spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> torch.Tensor:
    """Eq. 5 with the position of a voxel as its representation: parts that are compact in space cost little.

    Relative, as [`region_consistency`] is: the share of the spatial spread of each family, taken as a whole, that its
    parts leave unexplained. The coordinates of a grid are separable, so the sums over voxels reduce to sums over the
    marginals of the masks along each axis; the result is exact.

    Args:
        masks: (B, K, H, W, D) soft parts.
        families: groups of parts that divide one structure between them, such as the inclusions of a cell. The part
            that surrounds the inclusions should not be in a family: its centre coincides with theirs.
        spacing: edge lengths of a voxel in mm, along H, W and D.

    Returns:
        Scalar in [0, 1], averaged over families and batch; float32, or float64 for float64 masks.

    Raises:
        ValueError: if there is no family, or a family has fewer than two parts.
    """
    if not families or min(map(len, families)) < 2:
        raise ValueError(f"`families` must hold one or more groups of at least two parts, got {families!r}.")
    with torch.autocast(masks.device.type, enabled=False):
        masks = masks if masks.dtype == torch.float64 else masks.float()
        shares = []
        for family in families:
            parts = torch.stack([masks[:, part] for part in family], dim=1)  # no indices from the host
            whole = _spread(parts.sum(dim=1, keepdim=True), spacing)[:, 0]
            tiny = torch.finfo(masks.dtype).eps * parts.sum(dim=(1, 2, 3, 4)).clamp(min=1)
            shares.append(_spread(parts, spacing).sum(dim=1) / torch.maximum(whole, tiny))
        return torch.stack(shares).mean()


def smoothness(masks: torch.Tensor, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> torch.Tensor:
    """Expected Potts energy of the soft parts: the share of the area between neighbouring voxels that is a boundary.

    The voxels' parts count as independent draws from the masks, so that two neighbours u and v lie in different parts
    with probability 1 - sum_k M_ku M_kv. Each pair of neighbours is weighted by the area of the face they share, which
    makes the sum the expected area of the boundaries in mm² where voxels are anisotropic.

    Args:
        masks: (B, K, H, W, D) soft parts, summing to 1 over K.
        spacing: edge lengths of a voxel in mm, along H, W and D.

    Returns:
        Scalar in [0, 1], averaged over the batch; float32, or float64 for float64 masks.

    Raises:
        ValueError: if the grid of the masks has one voxel along every axis.
    """
    with torch.autocast(masks.device.type, enabled=False):
        masks = masks if masks.dtype == torch.float64 else masks.float()
        boundary, total = 0.0, 0.0
        for axis in (2, 3, 4):
            pairs = masks.shape[axis] - 1
            if pairs < 1:
                continue
            area = math.prod(spacing) / spacing[axis - 2]
            same = (masks.narrow(axis, 0, pairs) * masks.narrow(axis, 1, pairs)).sum(dim=1)
            boundary = boundary + area * (1 - same).sum(dim=(1, 2, 3))
            total += area * same[0].numel()
        if not total:
            raise ValueError(f"`masks` must have two or more voxels along an axis, got shape {tuple(masks.shape)}.")
        return (boundary / total).mean()


def assignment_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    families: Sequence[Sequence[int]],
    interchangeable: bool = False,
) -> torch.Tensor:
    """Cross-entropy and soft Dice distance between the parts of a network and assigned parts.

    Args:
        logits: (B, K, H, W, D), minus infinity where a part cannot lie.
        labels: (B, H, W, D) int64, the assigned part of every voxel.
        families: groups of parts that divide one structure between them, the part that surrounds the others first.
            Every family counts the same, over the voxels that are assigned to it; other voxels do not count.
        interchangeable: number the parts of a family, but for the first, in each volume as the network does. Targets
            of one kind have no order, and the network finds one of its own.

    Returns:
        Scalar, averaged over families and batch; families without a voxel in a volume count zero.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probs = logits.float().log_softmax(dim=1)
        losses = []
        for family in families:
            orders = [tuple(family)]
            if interchangeable:
                orders = [(family[0], *order) for order in itertools.permutations(family[1:])]
            truth = torch.stack([labels == part for part in family], dim=1).float()  # (B, k, H, W, D)
            within = truth.sum(dim=1, keepdim=True)
            found = [log_probs[:, part].masked_fill(~within[:, 0].bool(), 0.0) for part in family]
            found = torch.stack(found, dim=1)
            probs = found.exp() * within
            volume = within.sum(dim=(1, 2, 3, 4))
            sizes = probs.sum(dim=(2, 3, 4))[:, :, None] + truth.sum(dim=(2, 3, 4))[:, None]  # (B, found, true)
            overlap = torch.einsum("bixyz,bjxyz->bij", probs, truth)
            entropy = -torch.einsum("bixyz,bjxyz->bij", found, truth) / volume.clamp(min=1)[:, None, None]
            cost = entropy + (1 - (2 * overlap + 1) / (sizes + 1)) / len(family)
            places = tuple(tuple(family.index(part) for part in order) for order in orders)
            places = _on_device(places, logits.device)
            columns = torch.arange(len(family), device=logits.device)
            losses.append(cost[:, places, columns].sum(dim=2).amin(dim=1) * (volume > 0))
        return torch.stack(losses).mean()


@functools.lru_cache(maxsize=64)
def _on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """A table of indices, cached to avoid a synchronising copy to a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)


def _spread(masks: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """sum_u M_ku |p_u - z_k|^2 for the positions p in mm and the centres z: (B, K)."""
    size = masks.sum(dim=(2, 3, 4))
    total = torch.zeros_like(size)
    for axis, step in zip((2, 3, 4), spacing, strict=True):
        n = masks.shape[axis]
        position = (torch.arange(n, dtype=masks.dtype, device=masks.device) - (n - 1) / 2) * step
        marginal = masks.sum(dim=[a for a in (2, 3, 4) if a != axis])
        first = marginal @ position
        total = total + marginal @ position.square() - first.square() / size.clamp(min=torch.finfo(masks.dtype).eps)
    return total.clamp(min=0)


@functools.lru_cache(maxsize=64)
def interpolation_matrix(
    coarse: int, extent: int, fine: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Linear interpolation along one axis with aligned corners, as a matrix.

    The result is cached because training uses the same sizes at every step; do not modify it in place.

    Returns:
        (fine, coarse): row i holds the weights of voxel i on the coarse grid, for the first `fine` of `extent` voxels.
    """
    with torch.inference_mode(False):  # an inference tensor could not be used in later training
        if coarse == 1:
            return torch.ones(fine, 1, dtype=dtype, device=device)
        position = torch.arange(fine, dtype=torch.float64) * ((coarse - 1) / (extent - 1))
        nodes = torch.arange(coarse, dtype=torch.float64)
        return (1 - (position[:, None] - nodes[None, :]).abs()).clamp(min=0).to(device, dtype)


def _consistency(masks, features, extent, relative, within) -> torch.Tensor:
    """Eq. 5 of one feature map for each volume of the batch: (B,)."""
    grid, coarse = masks.shape[2:], features.shape[2:]
    if features.ndim != 5 or features.shape[0] != masks.shape[0]:
        raise ValueError(
            f"`features` must be (batch, channel, h, w, d) for {masks.shape[0]} volumes, got {tuple(features.shape)}."
        )
    power = features.square().mean(dim=(2, 3, 4)).sum(dim=1)
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
    # constant features have zero variance: avoid dividing by rounding error
    rounding = (4 * torch.finfo(variance.dtype).eps) ** 2 * voxels * power
    return unexplained / torch.maximum(variance, rounding).clamp(min=torch.finfo(variance.dtype).tiny)


def _explained(masks, features, matrices) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_u M_ku h_u for every channel and part, shape (B, C, K), and sum_k |sum_u M_ku h_u|^2 / m_k, shape (B,)."""
    on_coarse = masks if matrices is None else _apply_along_axes(masks, matrices)  # U^T M
    sums = features.flatten(2) @ on_coarse.flatten(2).transpose(1, 2)
    sizes = masks.sum(dim=(2, 3, 4)).clamp(min=torch.finfo(masks.dtype).tiny)
    return sums, (sums.square().sum(dim=1) / sizes).sum(dim=1)


def _apply_along_axes(x: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract the three grid axes of (B, C, H, W, D) with one (old, new) matrix each, last axis first."""
    for axis, matrix in zip((4, 3, 2), reversed(matrices), strict=True):
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x

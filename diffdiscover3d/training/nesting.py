"""Nested discovery: choice of the parent parts to divide, and the parent-child relations used by the losses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.training.config import DiscoveryConfig

_VOLUMES = 16  # maximum number of training volumes for the split scores


def choose_children(
    parent: StructureDiscoveryModel,
    teacher: DiffusionFeaturePipeline,
    volumes: Sequence[dict],
    config: DiscoveryConfig,
) -> tuple[int, ...]:
    """Choose the number of children of each part of a parent, without labels.

    Half of the parent's parts stay undivided; the remaining parts are distributed evenly over the other half. At the
    first level, the split score of a part is the variance of the teacher's clean prediction within it. At nested
    levels, undivided parts stay undivided, and smaller parts have higher split scores because inclusions are smaller
    than the enclosing part.

    Returns:
        The number of children of each part; they sum to `config.num_parts`.

    Raises:
        ValueError: if `config.num_parts` is too small to divide any part.
    """
    nested = parent.parents is not None
    scores = []
    for i in range(min(len(volumes), _VOLUMES)):
        volume = volumes[i]["volume"][None].to(teacher.device)
        labels = parent.segment(volume).labels[0]
        if nested:
            scores.append([-float((labels == part).float().mean()) for part in range(parent.config.num_parts)])
        else:
            denoised = denoise(teacher, volume, config, i)
            values = [denoised[labels.to(denoised.device) == part] for part in range(parent.config.num_parts)]
            scores.append([float(x.var()) if len(x) > 1 else 0.0 for x in values])
    divided = divided_parts(parent)
    whole = [part for part in range(parent.config.num_parts) if part not in divided]
    return share_parts(torch.tensor(scores).mean(dim=0).tolist(), config.num_parts, whole)


def denoise(teacher: DiffusionFeaturePipeline, volume: torch.Tensor, config: DiscoveryConfig, index: int):
    """The clean prediction of a (1, 1, H, W, D) volume, averaged over `config.denoised_timesteps`: (H, W, D)."""
    generator = torch.Generator().manual_seed(config.seed + index)
    grid, found = teacher.unet.noise_grid or tuple(volume.shape[2:]), []
    for timestep in config.denoised_timesteps:
        noise = torch.randn((1, 1, 1, *grid), generator=generator).to(teacher.device)
        found.append(teacher.extract(volume, noise, timestep, (), denoised=True).denoised[0, 0])
    return torch.stack(found).mean(dim=0)


def share_parts(split_scores: Sequence[float], num_parts: int, whole: Sequence[int] = ()) -> tuple[int, ...]:
    """Distribute `num_parts` children over the parts of a parent according to their split scores.

    Half of the parts stay undivided: first those in `whole`, then those with the lowest scores. The remaining children
    are distributed evenly over the other half.

    Returns:
        The number of children of each part; they sum to `num_parts`.

    Raises:
        ValueError: if `num_parts` does not exceed the number of parts of the parent.
    """
    order = sorted(range(len(split_scores)), key=lambda part: (part not in whole, split_scores[part]))
    kept, divided = order[: len(order) // 2], order[len(order) // 2 :][::-1]
    left = num_parts - len(kept)
    if left <= len(divided):
        raise ValueError(
            f"`num_parts` must exceed the parent's {len(split_scores)} parts to divide any; got {num_parts}."
        )
    children = dict.fromkeys(kept, 1)
    for i, part in enumerate(divided):
        children[part] = left // len(divided) + (i < left % len(divided))
    return tuple(children[part] for part in range(len(split_scores)))


def divided_parts(model: StructureDiscoveryModel) -> list[int]:
    """The parts predicted by the network: all parts, or with a parent those whose parent part is divided."""
    if model.parents is None:
        return list(range(model.config.num_parts))
    return [part for part, parent in enumerate(model.parents) if model.config.children[parent] > 1]


def parent_matrix(model: StructureDiscoveryModel) -> torch.Tensor | None:
    """(K, P) matrix with 1 where a part belongs to a part of the parent, otherwise 0; `None` without a parent."""
    if model.parents is None:
        return None
    return F.one_hot(torch.tensor(model.parents, device=model.device), len(model.config.children)).float()


def parent_masks(masks: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """The soft parts of the parent, (B, P, H, W, D), as sums over their children.

    Args:
        masks: (B, K, H, W, D) soft parts.
        parents: (K, P) matrix from [`parent_matrix`].
    """
    return torch.einsum("bkhwd,kp->bphwd", masks.detach(), parents)

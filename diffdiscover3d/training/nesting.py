"""Nested discovery: which parts of a coarser network are divided, and what the losses need to know of it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.training.config import DiscoveryConfig

_VOLUMES = 16  # as many training volumes decide


def choose_children(
    parent: StructureDiscoveryModel,
    teacher: DiffusionFeaturePipeline,
    volumes: Sequence[dict],
    config: DiscoveryConfig,
) -> tuple[int, ...]:
    """Into how many parts to divide each part of a parent, without labels.

    Half of its parts are kept whole, the others share the parts that are left evenly. Of a first level those are
    divided in which the teacher's clean prediction varies most. Of a nested one, what was kept whole stays whole, and
    of the rest the smallest are divided: inclusions are smaller than what holds them.

    Raises:
        ValueError: if there are too few parts to divide anything.
    """
    nested = parent.parents is not None
    urges = []
    for i in range(min(len(volumes), _VOLUMES)):
        volume = volumes[i]["volume"][None].to(teacher.device)
        labels = parent.segment(volume).labels[0]
        if nested:
            urges.append([-float((labels == part).float().mean()) for part in range(parent.config.num_parts)])
        else:
            denoised = denoise(teacher, volume, config, i)
            inside = [denoised[labels.to(denoised.device) == part] for part in range(parent.config.num_parts)]
            urges.append([float(x.var()) if len(x) > 1 else 0.0 for x in inside])
    divided = divided_parts(parent)
    whole = [part for part in range(parent.config.num_parts) if part not in divided]
    return share_parts(torch.tensor(urges).mean(dim=0).tolist(), config.num_parts, whole)


def denoise(teacher: DiffusionFeaturePipeline, volume: torch.Tensor, config: DiscoveryConfig, index: int):
    """(H, W, D) the teacher's clean prediction of a (1, 1, H, W, D) volume, the mean over the config's timesteps."""
    generator = torch.Generator().manual_seed(config.seed + index)
    grid, found = teacher.unet.noise_grid or tuple(volume.shape[2:]), []
    for timestep in config.denoised_timesteps:
        noise = torch.randn((1, 1, 1, *grid), generator=generator).to(teacher.device)
        found.append(teacher.extract(volume, noise, timestep, (), denoised=True).denoised[0, 0])
    return torch.stack(found).mean(dim=0)


def share_parts(urges: Sequence[float], num_parts: int, whole: Sequence[int] = ()) -> tuple[int, ...]:
    """Share `num_parts` among parts by their urge to be divided.

    Half of them, those in `whole` and then those of the least urge, stay whole; the rest is divided evenly.
    """
    order = sorted(range(len(urges)), key=lambda part: (part not in whole, urges[part]))
    kept, divided = order[: len(order) // 2], order[len(order) // 2 :][::-1]
    left = num_parts - len(kept)
    if left <= len(divided):
        raise ValueError(
            f"`num_parts` must exceed the parent's {len(urges)} parts, so that some can be divided; got {num_parts}."
        )
    children = dict.fromkeys(kept, 1)
    for i, part in enumerate(divided):
        children[part] = left // len(divided) + (i < left % len(divided))
    return tuple(children[part] for part in range(len(urges)))


def divided_parts(model: StructureDiscoveryModel) -> list[int]:
    """The parts that the network decides on: all, or those that are not simply a part of the parent."""
    if model.parents is None:
        return list(range(model.config.num_parts))
    return [part for part, parent in enumerate(model.parents) if model.config.children[parent] > 1]


def parent_matrix(model: StructureDiscoveryModel) -> torch.Tensor | None:
    """(K, P), one where a part lies in a part of the parent, and zero elsewhere; `None` without a parent."""
    if model.parents is None:
        return None
    return F.one_hot(torch.tensor(model.parents, device=model.device), len(model.config.children)).float()


def parent_masks(masks: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """The parts of the parent, (B, P, H, W, D), as sums of the soft parts that divide them.

    Args:
        masks: (B, K, H, W, D) soft parts.
        parents: as [`parent_matrix`] gives it.
    """
    return torch.einsum("bkhwd,kp->bphwd", masks.detach(), parents)

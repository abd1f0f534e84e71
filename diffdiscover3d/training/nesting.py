"""Nested discovery: which parts of a coarser network are divided, and what the losses need to know of it."""

from collections.abc import Sequence

import torch

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

    Half of its parts are kept whole: those that were kept whole before, then those in which the teacher's clean
    prediction varies least. The others share the parts that are left evenly, those that vary most first.

    Raises:
        ValueError: if there are too few parts to divide anything.
    """
    spreads = []
    for i in range(min(len(volumes), _VOLUMES)):
        volume = volumes[i]["volume"][None].to(teacher.device)
        generator = torch.Generator().manual_seed(config.seed + i)
        grid = teacher.unet.noise_grid or tuple(volume.shape[2:])
        denoised = 0
        for timestep in config.denoised_timesteps:
            noise = torch.randn((1, 1, 1, *grid), generator=generator).to(teacher.device)
            denoised = denoised + teacher.extract(volume, noise, timestep, (), denoised=True).denoised[0, 0]
        labels = parent.segment(volume).labels[0].to(denoised.device)
        inside = [denoised[labels == part] for part in range(parent.config.num_parts)]
        spreads.append([float(x.var()) if len(x) > 1 else 0.0 for x in inside])
    divided = divided_parts(parent)
    whole = [] if parent.parents is None else [p for p in range(parent.config.num_parts) if p not in divided]
    return share_parts(torch.tensor(spreads).mean(dim=0).tolist(), config.num_parts, whole)


def share_parts(spreads: Sequence[float], num_parts: int, whole: Sequence[int] = ()) -> tuple[int, ...]:
    """Share `num_parts` among parts of the given spreads.

    Half of them, those in `whole` and then those of the least spread, stay whole; the rest is divided evenly.
    """
    order = sorted(range(len(spreads)), key=lambda part: (part not in whole, spreads[part]))
    kept, divided = order[: len(order) // 2], order[len(order) // 2 :][::-1]
    left = num_parts - len(kept)
    if left <= len(divided):
        raise ValueError(
            f"`num_parts` must exceed the parent's {len(spreads)} parts, so that some can be divided; got {num_parts}."
        )
    children = dict.fromkeys(kept, 1)
    for i, part in enumerate(divided):
        children[part] = left // len(divided) + (i < left % len(divided))
    return tuple(children[part] for part in range(len(spreads)))


def divided_parts(model: StructureDiscoveryModel) -> list[int]:
    """The parts that the network decides on: all, or those that are not simply a part of the parent."""
    if model.parents is None:
        return list(range(model.config.num_parts))
    return [part for part, parent in enumerate(model.parents) if model.config.children[parent] > 1]


def parent_masks(model: StructureDiscoveryModel, masks: torch.Tensor) -> torch.Tensor | None:
    """The parts of the parent, (B, P, H, W, D), as sums of the soft parts that divide them; `None` without a parent."""
    if model.parents is None:
        return None
    parents = torch.tensor(model.parents, device=masks.device)
    grouped = masks.new_zeros(masks.shape[0], len(model.config.children), *masks.shape[2:])
    return grouped.index_add(1, parents, masks.detach())

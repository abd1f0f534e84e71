"""Assigned parts as targets: the assignment step of a training that alternates assignments and network training.

A label map of every training volume is made before the first step, from nothing but frozen networks and the seed:
by clustering in space, or by the network that the training starts from. No labels are used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from scipy import ndimage

from diffdiscover3d.data.transforms import flip, resize_volume
from diffdiscover3d.errors import NothingToDivideError
from diffdiscover3d.losses import assignment_loss, smoothness, spatial_consistency
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.training.config import DiscoveryConfig
from diffdiscover3d.training.nesting import denoise
from diffdiscover3d.training.reliability import contrasts, separation
from diffdiscover3d.training.spatial_split import clean_pieces, count_pieces, divide_structure, refine_boundaries

logger = logging.getLogger("diffdiscover3d")
_MOST_FREE = 6  # parts of a structure whose every order is tried
_IGNORED = 255  # in a label map: a structure whose assignment is not reliable enough


@dataclass
class Assignment:
    """The assigned parts of a volume.

    Attributes:
        labels: (H, W, D) uint8.
        reliability: for each family, larger is better.
        contrast: for each family the contrast of its parts in standard deviations of the part that surrounds them.
        pieces: number of inclusions found, over all families.
    """

    labels: np.ndarray
    reliability: np.ndarray
    contrast: list[np.ndarray]
    pieces: int


class Assignments:
    """The assignments of all training volumes and the loss against them.

    Args:
        model: the network to train; the parts that it divides are its own parent's. Where `start` is given, its parts
            are the assignments, and otherwise the clusters in space of the teacher's clean prediction.
        volumes: to train on.
        grid: volumes are resampled to it; `None` leaves them.
        spacing: edge lengths of a voxel, for the spatial losses.

    Attributes:
        families: groups of parts that divide one structure, the part that surrounds the others first.
        used: indices of the volumes with a reliable family, in order; the training sees only these.
        free_order: whether the loss takes, in each volume, the order of the inclusions that fits the network best.
        contrast: standard deviation over structures and parts of the mean intensities, in standard deviations within
            a part.
    """

    def __init__(
        self,
        config: DiscoveryConfig,
        teacher: DiffusionFeaturePipeline,
        model: StructureDiscoveryModel,
        start: StructureDiscoveryModel | None,
        volumes: Sequence[dict],
        grid: tuple[int, int, int] | None,
        accelerator: Accelerator,
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ):
        self.spacing = spacing
        self.config, self.device = config, accelerator.device
        self.families = part_families(model)
        few = max(map(len, self.families)) <= _MOST_FREE
        if not few and config.sibling_order == "free":
            raise ValueError(
                f"`sibling_order` must be size where a structure has more than {_MOST_FREE} parts; 'free' tries every "
                "order."
            )
        self._labelled = config.assign_from == "labels"
        if not self._labelled and start is None and model.parents is None:
            raise ValueError(
                "`objective` is assignment without --parent and --init-from: there is no structure to cluster; "
                "train the first level with --objective consistency, then go on from it with --init-from."
            )
        parents = model.parents
        self._parents = None if parents is None else torch.tensor([*parents, 0], device=self.device)
        found, alike = self._assign_all(teacher, model, start, volumes, grid, accelerator)
        # the sizes of alike inclusions give them no order
        self.free_order = config.sibling_order == "free" or (config.sibling_order == "auto" and alike and few)
        reliability = np.stack([a.reliability for a in found])  # (volumes, families)
        keep = _best_share(reliability, config.reliable_share)
        self.used = [int(i) for i in np.flatnonzero(keep.any(axis=1))]
        if not self.used:
            raise NothingToDivideError(
                "`objective` is assignment and no volume has inclusions to assign; use --objective consistency."
            )
        # a structure without inclusions in any volume is one part; its label stays a target of the network
        keep[np.ix_(self.used, np.flatnonzero(~keep.any(axis=0)))] = True
        self.labels = [self._masked(found[i].labels, keep[i]) for i in self.used]
        seen = [c for i in self.used for f, c in enumerate(found[i].contrast) if keep[i, f]]
        self.contrast = float(np.sqrt(np.mean(np.concatenate(seen) ** 2) / 2))
        logger.info(
            "assigned %d volumes, %d of them reliable; contrast %.2f", len(found), len(self.used), self.contrast
        )

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict:
        """The network's inputs and targets for a batch whose indices count in `used`."""
        volume = batch["volume"]
        index, flips = batch["index"].tolist(), batch["flips"].cpu()
        maps = [flip(self.labels[i][0], f) for i, f in zip(index, flips, strict=True)]
        inside = [flip(self.labels[i][1], f) for i, f in zip(index, flips, strict=True)]
        labels = self._on_device(torch.stack(maps)).long()
        reliable = self._on_device(torch.stack(inside))
        gamma, inverted = (batch[name][:, None, None, None, None] for name in ("gamma", "inverted"))
        changed = torch.where(inverted, 1 - volume**gamma, volume**gamma)
        changed = recolor(changed, labels, self.families, batch["recolor"] * self.contrast, batch["recolored"])
        parent_labels = None if self._parents is None else self._parents[labels][:, None]
        return {"volume": changed, "parent_labels": parent_labels, "targets": labels.masked_fill(~reliable, _IGNORED)}

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        """A copy that a GPU makes in the background, for which the host's memory must be pinned."""
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def losses(self, model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        """The loss against the assignments of a prepared batch."""
        config, targets = self.config, batch["targets"]
        logits = model(batch["volume"], batch["parent_labels"]).logits.float()
        terms = {"assignment": assignment_loss(logits, targets, self.families, interchangeable=self.free_order)}
        if config.lambda_spatial > 0 or config.lambda_smooth > 0:
            terms |= spatial_terms(config, logits.softmax(dim=1), self.families, self.spacing)
        return {"loss": sum(terms.values()), **terms}

    def _assign_all(self, teacher, model, start, volumes, grid, accelerator) -> tuple[list[Assignment], bool]:
        """All assignments, and whether inclusions are alike.

        Every process assigns its share, then all get all: no process may decide by its own share alone.
        """
        rank, processes = accelerator.process_index, accelerator.num_processes
        alike = None if self.config.inclusions == "auto" else self.config.inclusions == "alike"
        found = self._assign_share(teacher, model, start, volumes, grid, range(rank, len(volumes), processes), alike)
        found = dict(gather_object(found))
        if alike is None:
            inclusions = sum(len(family) - 1 for family in self.families)
            alike = float(np.median([a.pieces for a in found.values()])) > inclusions
            logger.info("inclusions are taken to be %s", "alike" if alike else "compact")
            if alike:
                share = range(rank, len(volumes), processes)
                found = dict(gather_object(self._assign_share(teacher, model, start, volumes, grid, share, True)))
        return [found[i] for i in range(len(volumes))], bool(alike)

    def _assign_share(self, teacher, model, start, volumes, grid, indices, alike) -> list[tuple[int, Assignment]]:
        share = []
        for i in indices:
            volume = volumes[i]["volume"][None]
            spacing = self.config.spacing or tuple(volumes[i].get("spacing_mm", (1.0, 1.0, 1.0)))
            if grid is not None:
                spacing = tuple(s * n / m for s, n, m in zip(spacing, volume.shape[2:], grid, strict=True))
                volume = resize_volume(volume, grid)
            volume = volume.to(self.device)
            if self._labelled:
                share.append((i, self._from_labels(model, volume, volumes[i])))
            elif start is not None:
                share.append((i, self._from_network(start, volume, spacing, bool(alike))))
            else:
                clean = denoise(teacher, volume, self.config, i).cpu().numpy()
                share.append((i, self._from_clusters(model, volume, clean, spacing, bool(alike))))
        return share

    def _from_network(self, start, volume, spacing, alike) -> Assignment:
        found, raw = start.segment(volume), volume[0, 0].cpu().numpy()
        labels = found.labels[0].cpu().numpy().astype(np.int64)
        probabilities = found.probabilities[0].cpu().numpy()
        for family in self.families:
            within = np.isin(labels, family)
            if within.any():
                box = ndimage.find_objects(within.astype(np.uint8))[0]
                soft = probabilities[list(family)][(slice(None), *box)]
                refined = refine_boundaries(raw[box], soft, within[box], spacing)
                labels[box][within[box]] = np.asarray(family)[refined.argmax(axis=0)[within[box]]]
        labels = clean_pieces(labels, self.families, spacing, one=not alike)
        sure = probabilities.max(axis=0)
        reliability = [
            min(float(sure[labels == part].mean()) if (labels == part).any() else 0.0 for part in inner(family))
            for family in self.families
        ]
        return self._described(volume, labels, np.array(reliability))

    def _from_clusters(self, model, volume, clean, spacing, alike) -> Assignment:
        raw = volume[0, 0].cpu().numpy()
        parents = model.label_parents(volume)[0, 0].cpu().numpy()
        labels = np.zeros(raw.shape, dtype=np.int64)
        for part, parent in enumerate(model.parents):
            labels[parents == parent] = part  # parts that are kept whole; the others follow
        for family in self.families:
            within = parents == model.parents[family[0]]
            divided = divide_structure(
                raw, clean, within, len(family), spacing, alike, self.config.potts_strength, self.config.seed
            )
            labels[within] = np.asarray(family)[divided[within]]
        if self.config.reliability == "separation":
            reliability = [separation(raw, labels, family, spacing, alike) for family in self.families]
        else:
            reliability = [contrasts(raw, labels, family).min(initial=np.inf) for family in self.families]
        return self._described(volume, labels, np.array(reliability))

    def _from_labels(self, model, volume, item: dict) -> Assignment:
        """True labels, numbered as the parts of the network; each lies in the part of the parent it overlaps most."""
        true = _true_labels(item, model.config.num_parts)
        if model.parents is None:
            return self._described(volume, true, np.ones(1))
        parents = model.label_parents(volume)[0, 0].cpu().numpy()
        free = {parent: [k for k, p in enumerate(model.parents) if p == parent] for parent in set(model.parents)}
        labels = np.zeros_like(true)
        for part in range(model.config.num_parts):
            where = true == part
            overlaps = np.bincount(parents[where], minlength=len(free)).astype(float)
            overlaps[[parent for parent, left in free.items() if not left]] = -1  # as many parts as it has, no more
            labels[where] = free[int(overlaps.argmax())].pop(0)
        return self._described(volume, labels, np.ones(len(self.families)))

    def _described(self, volume, labels, reliability) -> Assignment:
        raw = volume[0, 0].cpu().numpy()
        contrast = [contrasts(raw, labels, family) for family in self.families]
        return Assignment(labels.astype(np.uint8), reliability, contrast, count_pieces(labels, self.families))

    def _masked(self, labels: np.ndarray, keep: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The map, and where it is reliable."""
        parts = [part for family, kept in zip(self.families, keep, strict=True) if kept for part in family]
        return torch.from_numpy(labels), torch.from_numpy(np.isin(labels, parts))


def part_families(model: StructureDiscoveryModel) -> list[tuple[int, ...]]:
    """Groups of parts that divide one structure; parts are ordered by size, so the one that surrounds comes first."""
    if model.parents is None:
        return [tuple(range(model.config.num_parts))]
    groups: dict[int, list[int]] = {}
    for part, parent in enumerate(model.parents):
        groups.setdefault(parent, []).append(part)
    return [tuple(parts) for parent, parts in sorted(groups.items()) if model.config.children[parent] > 1]


def inner(family: Sequence[int]) -> Sequence[int]:
    """The inclusions of a family; of two parts both count."""
    return family[1:] if len(family) > 2 else family


def spatial_terms(
    config: DiscoveryConfig, masks: torch.Tensor, families: Sequence[Sequence[int]], spacing: Sequence[float]
) -> dict[str, torch.Tensor]:
    """The weighted spatial consistency of the inclusions and the weighted smoothness of all parts."""
    terms = {}
    inclusions = [family[1:] for family in families if len(family) > 2]
    if config.lambda_spatial > 0 and inclusions:
        terms["spatial"] = config.lambda_spatial * spatial_consistency(masks, inclusions, spacing)
    if config.lambda_smooth > 0:
        terms["smooth"] = config.lambda_smooth * smoothness(masks, spacing)
    return terms


def recolor(
    volume: torch.Tensor,
    labels: torch.Tensor,
    families: Sequence[Sequence[int]],
    means: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """Give assigned parts other mean intensities and leave everything else about them.

    A part keeps its texture and noise, so that parts found at high contrast are training examples of low contrast.

    Args:
        volume: (B, 1, H, W, D).
        labels: (B, H, W, D) int64, assigned parts.
        families: groups of parts that divide one structure.
        means: (B, K) new means, in standard deviations of the structure's intensities about the means of its parts.
        chosen: (B,) bool, which volumes to change.

    Returns:
        (B, 1, H, W, D); the structure's own mean may change, too.
    """
    out = volume[:, 0]
    for family in families:
        masks = torch.stack([labels == part for part in family], dim=1).to(volume.dtype)  # (B, k, H, W, D)
        sizes = masks.sum(dim=(2, 3, 4))
        old = (masks * volume).sum(dim=(2, 3, 4)) / sizes.clamp(min=1)
        within = masks.sum(dim=1)
        rest = (volume[:, 0] - torch.einsum("bk,bkxyz->bxyz", old, masks)) * within
        spread = (rest.square().sum(dim=(1, 2, 3)) / sizes.sum(dim=1).clamp(min=1)).sqrt()
        centre = (old * sizes).sum(dim=1) / sizes.sum(dim=1).clamp(min=1)
        drawn = torch.stack([means[:, part] for part in family], dim=1)  # a list as an index would be copied to a GPU
        new = centre[:, None] + spread[:, None] * drawn
        shift = torch.einsum("bk,bkxyz->bxyz", new - old, masks)
        out = out + shift * chosen[:, None, None, None]
    return out[:, None]


def _true_labels(item: dict, num_parts: int) -> np.ndarray:
    """The map of true labels that has this number of parts."""
    for labels in item.get("labels", ()):
        if int(labels.max()) + 1 == num_parts:
            return labels.numpy().astype(np.int64)
    raise ValueError(f"`assign_from` is labels and {item['name']} has no true labels of {num_parts} parts.")


def _best_share(reliability: np.ndarray, share: float) -> np.ndarray:
    """Which families of which volumes are in the best `share` of their family; those without any reliability never."""
    keep = np.zeros(reliability.shape, dtype=bool)
    count = max(1, round(share * len(reliability)))
    for family in range(reliability.shape[1]):
        best = np.argsort(-reliability[:, family], kind="stable")[:count]
        keep[best, family] = reliability[best, family] > 0
    return keep

"""The parts of a scan that is in memory as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.foreground import Frame, find_foreground, looks_like_head, robust_scale
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, write_like
from diffdiscover3d.data.formats.units import UNKNOWN
from diffdiscover3d.data.intensity_range import describe_volume_range
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.data.working_grid import spacing_on
from diffdiscover3d.errors import MemoryLimitError, is_out_of_memory
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting.parts import PartStatistics, count_pairs, measure_parts, number_by_size
from diffdiscover3d.reporting.pictures import middle_slices
from diffdiscover3d.segmentation.finish import (
    OUTSIDE,
    bounding_box,
    numbers_with_background,
    read_mask,
    smoothed,
    without_small_pieces,
)
from diffdiscover3d.segmentation.job import ScanJob
from diffdiscover3d.segmentation.outputs import label_map

WHOLE_HEAD = (
    "the scan looks like a whole head: it has a dark layer below its surface; the model was trained on brain-extracted "
    "scans, so extract the brain first"
)
FAST_MIN_SIZE = 32  # voxels; an axis shorter than this would keep too few at half the resolution


@dataclass
class PartsInMemory:
    """The parts of one level of a scan in memory; a [`FoundParts`].

    Attributes:
        scan: in which they were found.
        labels: (H, W, D) part numbers of the results.
        num_parts: K.
        soft: (K, H, W, D) probabilities on the network's device until they are written, if they were requested.
        recorded: see [`FoundParts`].
    """

    scan: NiftiVolume
    labels: np.ndarray
    num_parts: int
    soft: torch.Tensor | None
    recorded: dict = field(default_factory=dict)

    def write(self, labels: Path, probabilities: Path | None) -> None:
        planes = self.scan.to_input_grid(self.labels).T
        with label_map(labels, self.scan, self.labels.dtype, self.num_parts) as write:
            for plane in planes:
                write(plane[None])
        if probabilities:
            write_like(probabilities, np.moveaxis(self.soft.cpu().numpy(), 0, -1), self.scan)
        self.soft = None  # the largest array of all

    def statistics(self, topology: bool) -> list[PartStatistics]:
        return measure_parts(self.labels, self.scan.data, self.scan.affine, self.num_parts, topology=topology)

    def middle_slices(self) -> list[np.ndarray]:
        return middle_slices(self.labels)

    def sample(self, picks: Sequence[np.ndarray]) -> np.ndarray:
        return self.labels[np.ix_(*picks)]

    def count_pairs(self, coarser: "PartsInMemory") -> np.ndarray:
        return count_pairs(self.labels, coarser.labels, self.num_parts, coarser.num_parts)


class InMemoryFinder:
    """Finds the parts of a scan in memory; a [`PartFinder`].

    Args:
        job: the scan's job.
        scan: as [`read_nifti`] reads it.
    """

    def __init__(self, job: ScanJob, scan: NiftiVolume):
        self.job, self.scan, self.notes = job, scan, list(scan.notes)
        # by network: its labels on the grid on which they were found, and on the scan's grid
        self._found: dict[StructureDiscoveryModel, tuple[torch.Tensor, torch.Tensor]] = {}
        self._worked_on: tuple[int, int, int] | None = None  # the grid, if not the scan's
        self._mask = None if job.finish.mask is None else read_mask(job.finish.mask, scan)
        self._box = None if self._mask is None else bounding_box(self._mask)
        if any(getattr(n.config, "scaling", "min_max") == "min_max" for n in job.networks.values()):
            self.notes += describe_volume_range(scan.data if self._mask is None else scan.data[self._mask])

    def find(self, level: int | None) -> PartsInMemory:
        """See [`PartFinder`]."""
        network, finish, wanted = self.job.networks[level], self.job.finish, self.job.extras.probabilities
        for coarser in network.levels[:-1]:
            if coarser not in self._found:
                self._soft_parts(coarser)
        soft = self._soft_parts(network)
        count = network.config.num_parts
        labels = self._found[network][1].cpu().numpy()
        labels = labels if labels.dtype == np.uint8 else labels.astype(np.uint16)
        numbers = number_by_size(labels, count) if self.job.order == "size" else np.arange(count)
        numbers = numbers_with_background(numbers, finish.background)
        if (numbers != np.arange(count)).any():
            labels = np.argsort(numbers).astype(labels.dtype)[labels]
            soft = soft[torch.as_tensor(numbers, device=soft.device)] if wanted else None
        recorded = {}
        if self._worked_on is not None:
            extent = self.scan.shape if self._box is None else [box.stop - box.start for box in self._box]
            recorded = describe_working_grid(self._worked_on, extent, self.scan.spacing_mm, self.scan.unit)
        if finish.background is not None:
            recorded["background"] = finish.background
        if self._mask is not None:
            labels = np.where(self._mask[self._box], labels + 1, 0).astype(np.uint8 if count < 256 else np.uint16)
            whole = np.zeros(self.scan.shape, labels.dtype)
            whole[self._box] = labels
            labels, count, recorded = whole, count + 1, {**recorded, "background": OUTSIDE}
        return PartsInMemory(self.scan, labels, count, soft if wanted else None, recorded)

    def middle_slices(self) -> list[np.ndarray]:
        """See [`PartFinder`]."""
        return middle_slices(self.scan.data)

    def shrink(self, grid: Sequence[int]) -> np.ndarray:
        """See [`PartFinder`]."""
        return resize_volume(torch.from_numpy(self.scan.data)[None, None], grid)[0, 0].numpy()

    def check_unchanged(self) -> None:
        """Nothing can change an array in memory."""

    def _note_whole_head(self, volume: torch.Tensor, grid: tuple[int, int, int]) -> None:
        foreground = find_foreground(volume[None, None])
        frame = Frame.around(foreground, grid)
        scaled = frame.crop(robust_scale(volume[None, None], foreground))
        if looks_like_head(scaled, frame.crop(foreground.float()) > 0.5):
            self.notes.append(WHOLE_HEAD)

    def _soft_parts(self, network: StructureDiscoveryModel) -> torch.Tensor:
        """(K, H, W, D) soft parts, each zero outside its parent; the labels are kept for the next level."""
        soft, found, resampled = self._probabilities(network)
        if self.job.finish.smooth:
            soft = torch.from_numpy(smoothed(soft.cpu().numpy(), self.job.finish.smooth)).to(soft.device)
        finish, coarser = self.job.finish, None
        if network.parent_model in self._found:
            coarser = self._found[network.parent_model][1]
            if resampled or finish.smooth or finish.min_size:
                keep_within_parents(soft, coarser, network.parents)
        labels = soft.max(dim=0).indices.to(torch.uint8 if len(soft) <= 256 else torch.int32)
        if finish.min_size:
            within = None if coarser is None else coarser.cpu().numpy()
            labels = without_small_pieces(labels.cpu().numpy(), finish.min_size, len(soft), within)
            labels = torch.from_numpy(labels).to(soft.device)
        self._found[network] = (found, labels)
        return soft

    def _working_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape of the grid on which parts of the scan, or of the box around the mask in it, are found."""
        working, scan = self.job.working_grid, self.scan
        return shape if working is None else working.of(shape, scan.spacing_mm, scan.unit, self.job.case.input)

    def _probabilities(self, network: StructureDiscoveryModel) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """(K, H, W, D) soft parts, the labels on the grid on which they were found, and whether it is another grid.

        On a working grid, or at half the resolution, the soft parts are resampled like the scan.
        """
        job = self.job
        if self._mask is None:
            volume = torch.from_numpy(self.scan.data)
        else:  # outside, the smallest value inside: as scans have it whose background was removed
            inside, data = self._mask[self._box], self.scan.data[self._box]
            volume = torch.from_numpy(np.where(inside, data, data[inside].min()))
        grid = tuple(volume.shape)
        parents = {}
        if network.parent_model in self._found:
            parents["parent_labels"] = self._found[network.parent_model][0]
        try:
            size, self._worked_on = self._working_shape(grid), None
            framed = getattr(network.config, "frame", None) is not None  # such a network has a working grid of its own
            if job.fast and not framed and min(size) >= FAST_MIN_SIZE:
                size = tuple((n + 1) // 2 for n in size)
            if size != grid:
                self._worked_on = size
                found = network.segment(resize_volume(volume[None, None].to(network.device), size), **parents)
                return resize_volume(found.probabilities, grid)[0], found.labels, True
            note = (
                f"too small to be halved ({FAST_MIN_SIZE} voxels are needed along each axis); done at full resolution"
            )
            if job.fast and job.working_grid is None and not framed and note not in self.notes:
                self.notes.append(note)
            found = network.segment(volume, **parents)
            if framed and network.parent_model is None:
                self._note_whole_head(volume, tuple(network.config.frame))
            return found.probabilities[0], found.labels, framed
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(
                f"{job.case.input}: a volume of shape {grid} does not fit into the memory of {network.device}; "
                "use --fast, resample it, or use --device cpu or a larger machine."
            ) from error


def describe_working_grid(
    grid: Sequence[int], extent: Sequence[int], spacing_mm: Sequence[float], unit: str
) -> dict[str, dict]:
    """The sidecar's entry about the grid on which parts were found.

    Args:
        grid: its shape.
        extent: voxels of the scan, or of a box in it, that the grid spans.
        spacing_mm: edge lengths of these voxels.
        unit: of the scan's file.
    """
    voxel = [float(f"{edge:.6g}") for edge in spacing_on(grid, extent, spacing_mm)]
    return {"working_grid": {"shape": list(grid), f"voxel_size_{'voxels' if unit == UNKNOWN else 'mm'}": voxel}}


def keep_within_parents(soft: torch.Tensor, parent_labels: torch.Tensor, parents: Sequence[int]) -> None:
    """Set each part to zero outside its parent and normalise again, in place.

    Soft parts of two levels that were resampled apart disagree at the borders of the coarser parts.

    Args:
        soft: (K, H, W, D) probabilities of the finer level.
        parent_labels: (H, W, D) part numbers of the coarser level.
        parents: (K,) the coarser part that holds each part. Where all parts of a voxel's parent are zero they become
            equally probable.
    """
    total = torch.zeros_like(soft[0])
    for part, parent in enumerate(parents):
        soft[part].mul_(parent_labels == parent)
        total += soft[part]
    lost = total <= torch.finfo(soft.dtype).tiny
    for part, parent in enumerate(parents):
        soft[part] = torch.where(lost, (parent_labels == parent) / parents.count(parent), soft[part] / total)

"""The parts of a scan that is too large for one pass of the network: found slab by slab, kept on disk."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.formats.nifti.output import nifti_stream, output_header
from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.data.intensity_range import describe_range
from diffdiscover3d.errors import MemoryLimitError, is_out_of_memory
from diffdiscover3d.models.sliding_window import count_windows, stream_parts
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.window_layout import choose_window
from diffdiscover3d.reporting.parts import PartStatistics, count_pairs
from diffdiscover3d.reporting.slab_parts import PartSums, Topology
from diffdiscover3d.reporting.slab_views import middle_regions, sample, shrink, spread_values
from diffdiscover3d.segmentation.finish import numbers_with_background
from diffdiscover3d.segmentation.job import ScanJob
from diffdiscover3d.segmentation.outputs import label_map
from diffdiscover3d.utils.files import scratch_file


@dataclass
class StoredParts:
    """The parts of one level of a scan, on disk; a [`FoundParts`].

    Attributes:
        scan: in which they were found.
        labels: part numbers as the network gives them.
        sums: sizes, positions and intensities.
        soft: the probabilities of each part, if they were requested.
        window, windows: the side of the windows, and how many there were.
        order: (K,) the network's number of each part in the results.
        background: the part that became 0, if one was chosen.
        worked_on: the sidecar's entry about the grid on which they were found, if it is not the scan's.
    """

    scan: SlabScan
    labels: RawGrid
    sums: PartSums
    soft: list[RawGrid] | None
    window: int
    windows: int
    order: np.ndarray
    background: int | None = None
    worked_on: dict = field(default_factory=dict)

    @property
    def num_parts(self) -> int:
        """See [`FoundParts`]."""
        return self.sums.num_parts

    @property
    def recorded(self) -> dict:
        """See [`FoundParts`]."""
        windows = {**self.worked_on, "windows": {"side": self.window, "count": self.windows}}
        return windows if self.background is None else {**windows, "background": self.background}

    def write(self, labels: Path, probabilities: Path | None) -> None:
        """See [`FoundParts`]; the same bytes as from memory."""
        with label_map(labels, self.scan, self.labels.dtype, self.num_parts) as write:
            for start, stop in self.labels.slabs():
                write(self.planes(start, stop))
        if probabilities:
            self._write_soft(probabilities)

    def statistics(self, topology: bool) -> list[PartStatistics]:
        """See [`FoundParts`]."""
        found = None
        if topology:
            found = Topology(self.num_parts)
            for start, stop in self.labels.slabs():
                found.add(self.planes(start, stop))
        return self.sums.statistics(self.scan.affine, self.order, found)

    def middle_slices(self) -> list[np.ndarray]:
        """See [`FoundParts`]."""
        return [self._renumbered(cut) for cut in middle_regions(self.scan.shape, self.labels.read)]

    def sample(self, picks: Sequence[np.ndarray]) -> np.ndarray:
        """See [`FoundParts`]."""
        return self._renumbered(sample(self.labels, picks))

    def count_pairs(self, coarser: "StoredParts") -> np.ndarray:
        """See [`FoundParts`]."""
        return sum(
            count_pairs(self.planes(*slab), coarser.planes(*slab), self.num_parts, coarser.num_parts)
            for slab in coarser.labels.slabs()
        )

    def planes(self, start: int, stop: int) -> np.ndarray:
        """(planes, rows, columns) part numbers of the results, on the axes of the scan's file."""
        return self._renumbered(self.labels.read_planes(start, stop))

    def _renumbered(self, labels: np.ndarray) -> np.ndarray:
        """The network's part numbers as those of the results."""
        return np.argsort(self.order).astype(labels.dtype)[labels]

    def _write_soft(self, path: Path) -> None:
        header = output_header(self.scan.header, np.dtype(np.float32), (*self.labels.shape, len(self.soft)), False)
        with nifti_stream(path, header) as write:
            for number in self.order:
                for start, stop in self.labels.slabs():
                    write(self.soft[number].read_planes(start, stop).T)


class OutOfCoreFinder:
    """Finds the parts of an open scan; a [`PartFinder`]. A coarser level that was found is not searched for again.

    Args:
        job: the scan's job.
        scan: as [`stream_volume`] opens it.
        folder: for temporary files.
        scratch: closes these files.
    """

    def __init__(self, job: ScanJob, scan: SlabScan, folder: Path, scratch: ExitStack):
        self.job, self.scan = job, scan
        self.divided = scan  # from which the windows are cut
        # only networks with min-max scaling take a scan by slabs
        self.notes = [*scan.notes, *describe_range(spread_values(scan), scan.low, scan.high)]
        self._folder, self._scratch = folder, scratch
        self.found: dict[StructureDiscoveryModel, StoredParts] = {}

    def find(self, level: int | None) -> StoredParts:
        """See [`PartFinder`]."""
        network = self.job.networks[level]
        missing = [n for n in network.levels if n not in self.found]
        sides = {n: choose_window(self.divided.shape, n.config) for n in missing}
        total, done = sum(count_windows(self.divided.grid, side) for side in sides.values()), 0

        def on_window() -> None:
            nonlocal done
            done += 1
            self.job.stages.within(done, total, "window")

        for n in missing:
            self.found[n] = self.divide(n, sides[n], self.job.extras.probabilities and n is network, on_window)
        found = self.found[network]
        if self.job.order == "size":
            found.order = found.sums.by_size()
        found.background = self.job.finish.background
        found.order = numbers_with_background(found.order, found.background)
        return found

    def middle_slices(self) -> list[np.ndarray]:
        """See [`PartFinder`]."""
        return middle_regions(self.scan.shape, self.scan.read)

    def shrink(self, grid: Sequence[int]) -> np.ndarray:
        """See [`PartFinder`]."""
        return shrink(self.scan, grid)

    def check_unchanged(self) -> None:
        """See [`PartFinder`]."""
        self.scan.check_unchanged()

    def divide(
        self, network: StructureDiscoveryModel, side: int, soft: bool, on_window: Callable[[], None]
    ) -> StoredParts:
        """The parts of one network, once those of its ancestors are found.

        Args:
            network: of any level.
            side: of the windows.
            soft: also keep the probabilities.
            on_window: called after each window.
        """
        count = network.config.num_parts
        (labels,) = self.grids(1, np.dtype(np.uint8 if count <= 256 else np.uint16))
        probabilities = self.grids(count, np.dtype(np.float32)) if soft else None

        def keep(plane: int, row: int, sums: torch.Tensor) -> None:
            labels.write_rows(plane, row, largest(sums.numpy(), labels.dtype))
            if probabilities:
                for grid, values in zip(probabilities, sums / sums.sum(dim=0), strict=True):
                    grid.write_rows(plane, row, values.numpy())

        parents = {}
        if network.parent_model is not None:
            above = self.found[network.parent_model]
            parents = {"parents": above.labels, "moments": self._moments(above.sums).to(network.device)}
        try:
            stream_parts(network, self.scan, side, keep, on_window=on_window, **parents)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryLimitError(
                f"{self.scan.path}: a volume of shape {self.scan.shape} does not fit into the memory of "
                f"{network.device}, not even in windows of {side} voxels; resample it, or use --device cpu or a larger "
                "machine."
            ) from error
        sums = PartSums(count, self.scan.shape)
        for start, stop in labels.slabs():
            region = labels.slab_region(start, stop)
            sums.add(region, labels.read(region), self.scan.read(region))
        windows = count_windows(self.scan.grid, side)
        return StoredParts(self.scan, labels, sums, probabilities, side, windows, np.arange(count))

    def _moments(self, sums: PartSums) -> torch.Tensor:
        """(K, 2) mean and standard deviation in each part of the scan, normalised to [0, 1]."""
        mean, std = sums.moments()
        low, extent = float(self.scan.low), float(self.scan.high - self.scan.low)
        found = np.stack([(mean - low) / extent, std / extent], axis=1)
        return torch.from_numpy(np.nan_to_num(found).astype(np.float32))  # empty parts have no moments

    def grids(self, count: int, dtype: np.dtype) -> list[RawGrid]:
        """Temporary files for `count` volumes on the scan's grid."""
        grid = self.scan.grid
        size = int(np.prod(grid.shape)) * dtype.itemsize
        file = self._scratch.enter_context(scratch_file(self._folder, count * size)).raw
        return [RawGrid(file, grid.shape, dtype, grid.orientation, i * size) for i in range(count)]


def largest(sums: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The argmax over K of (K, rows, columns) values, the first in a tie; faster than numpy's across the first axis."""
    best, labels = sums[0].copy(), np.zeros(sums.shape[1:], dtype)
    for part, values in enumerate(sums[1:], start=1):
        labels[values > best] = part
        np.maximum(best, values, out=best)
    return labels

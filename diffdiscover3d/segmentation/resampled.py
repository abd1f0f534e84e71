"""The parts of a scan on disk that are found on a grid with the model's target spacing, in bounded memory."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.block_resampling import resample_block, resample_scan, write_block
from diffdiscover3d.data.formats.nifti.raw_grid import SLAB_VOXELS
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting.slab_parts import PartSums
from diffdiscover3d.segmentation.in_memory import describe_working_grid, keep_within_parents
from diffdiscover3d.segmentation.job import ScanJob
from diffdiscover3d.segmentation.out_of_core import OutOfCoreFinder, StoredParts, largest
from diffdiscover3d.utils.files import scratch_file


class ResampledFinder(OutOfCoreFinder):
    """Finds the parts of an open scan on another grid of the same extent; a [`PartFinder`].

    The resampled scan, its soft parts and the labels on the scan's own grid are on disk. As in memory, soft parts
    are resampled to the scan's grid and each finer part is kept within its coarser one.

    Args:
        job, scan, folder, scratch: as for [`OutOfCoreFinder`].
        grid: (h, w, d) on which the network works.
    """

    def __init__(self, job: ScanJob, scan: SlabScan, folder: Path, scratch: ExitStack, grid: Sequence[int]):
        super().__init__(job, scan, folder, scratch)
        room = scratch.enter_context(scratch_file(folder, 4 * int(np.prod(grid))))
        self.divided = resample_scan(scan, grid, room)
        self._on_grid = OutOfCoreFinder(job, self.divided, folder, scratch)

    def divide(
        self, network: StructureDiscoveryModel, side: int, soft: bool, on_window: Callable[[], None]
    ) -> StoredParts:
        """See [`OutOfCoreFinder`]."""
        small = self._on_grid.found[network] = self._on_grid.divide(network, side, True, on_window)
        count, shape, across = small.num_parts, self.scan.shape, self.scan.grid.axes[2]
        (labels,) = self.grids(1, small.labels.dtype)
        probabilities = self.grids(count, np.dtype(np.float32)) if soft else None
        sums = PartSums(count, shape)
        for planes in labels.slabs(max(1, SLAB_VOXELS // count)):
            region = labels.slab_region(*planes)
            start, stop = region[across].start, region[across].stop
            block = torch.stack(
                [resample_block(part.read, self.divided.shape, shape, start, stop, across) for part in small.soft]
            )
            if network.parent_model is not None:
                above = self.found[network.parent_model].labels.read(region)
                keep_within_parents(block, torch.from_numpy(above.astype(np.int32)), network.parents)
            found = largest(block.numpy(), labels.dtype)
            write_block(labels, start, stop, found)
            for grid, part in zip(probabilities or (), block, strict=False):
                write_block(grid, start, stop, part.numpy())
            sums.add(region, found, self.scan.read(region))
        worked_on = describe_working_grid(self.divided.shape, shape, self.scan.spacing_mm, self.scan.unit)
        order = np.arange(count)
        return StoredParts(self.scan, labels, sums, probabilities, small.window, small.windows, order, None, worked_on)

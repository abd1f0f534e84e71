"""One scan that is too large to be taken at once: its parts are found slab by slab, and written from the disk.

What `in_memory.py` does for a scan in memory, with the same files for a result.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.formats.nifti.output import nifti_stream, output_header
from diffdiscover3d.data.formats.nifti.raw_grid import RawGrid
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.errors import MemoryLimitError, is_out_of_memory
from diffdiscover3d.models.sliding_window import count_windows, stream_parts
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.models.window_layout import choose_window
from diffdiscover3d.reporting.parts import PartStatistics, count_pairs, nest_counts
from diffdiscover3d.reporting.pictures import save_cuts
from diffdiscover3d.reporting.slab_parts import PartSums, Topology
from diffdiscover3d.segmentation.in_memory import SegmentedFile, as_result, write_sidecars, write_tables
from diffdiscover3d.segmentation.outputs import CaseFiles, Extras
from diffdiscover3d.utils.files import scratch_file, sha256, staged_folder, write_json
from diffdiscover3d.utils.progress import Stages


@dataclass
class StoredParts:
    """The parts that a network found, on disk.

    Attributes:
        labels: part numbers as the network gives them.
        sums: sizes, places and intensities.
        soft: for each part its probabilities, if they were asked for.
        window, windows: the side of the windows, and how many there were.
        order: (K,) the network's number of each part in the results.
    """

    labels: RawGrid
    sums: PartSums
    soft: list[RawGrid] | None
    window: int
    windows: int
    order: np.ndarray

    def renumbered(self, labels: np.ndarray) -> np.ndarray:
        """The network's part numbers as those of the results."""
        return np.argsort(self.order).astype(labels.dtype)[labels]

    def planes(self, start: int, stop: int) -> np.ndarray:
        """(planes, rows, columns) part numbers of the results, on the axes of the scan's file."""
        return self.renumbered(self.labels.read_planes(start, stop))


def label_streamed(
    networks: dict[int | None, StructureDiscoveryModel],
    case: CaseFiles,
    scan: SlabScan,
    provenance: dict[int | None, dict],
    extras: Extras,
    read_seconds: float,
    stages: Stages,
) -> SegmentedFile:
    """Label one open scan at every level and write its results; if anything fails, none of what was written stays.

    Args:
        networks, case, provenance, extras, read_seconds, stages: as for [`label_scan`].
        scan: as [`open_slabs`] opens it.

    Raises:
        MemoryLimitError: if not even a window fits into the device's memory.
        OutputError: if a file cannot be written, or the disk cannot take what is kept on it meanwhile.
    """
    arguments = next(iter(provenance.values()))["arguments"]
    digest = sha256(case.input)
    stored: dict[int | None, StoredParts] = {}
    parts: dict[int | None, list[PartStatistics]] = {}
    fractions, sidecars = {}, {}
    with staged_folder(next(iter(case)).parent) as folder, ExitStack() as scratch:

        def staged(path: Path) -> Path:
            return folder / path.name

        clock = time.perf_counter()
        dividing = _Dividing(scan, folder, scratch, stages)
        for level, network in networks.items():
            stages.show("finding the parts" + (f" of level {level}" if len(networks) > 1 else ""))
            files = case.levels[level]
            found = stored[level] = dividing.divide(network, bool(files.probabilities))
            if arguments["order"] == "size":
                found.order = found.sums.by_size()
            topology = _look_at(found) if extras.statistics or case.report else None
            parts[level] = found.sums.statistics(scan.affine, found.order, topology)
            write_stored_labels(staged(files.labels), scan, found)
            if files.probabilities:
                _write_soft(staged(files.probabilities), scan, found)
            listed = parts[level] if extras.statistics else [replace(p, components=None) for p in parts[level]]
            fractions[level], sidecars[level] = write_tables(files, staged, listed)
            sidecars[level]["windows"] = {"side": found.window, "count": found.windows}
            stages.done()
        stages.show("writing the results")
        links = _nest(stored)
        if case.tree:
            write_json(staged(case.tree), {"input": case.input.name, "tree": links})
        if case.preview:
            _save_preview(staged(case.preview), scan, stored)
        seconds = read_seconds + time.perf_counter() - clock
        written = write_sidecars(case, staged, scan.header, digest, provenance, sidecars, scan.notes, seconds)
        if case.report:
            from diffdiscover3d.reporting.streamed_page import write_streamed_report

            shown = {level: (found.labels, found.renumbered) for level, found in stored.items()}
            write_streamed_report(staged(case.report), scan, case.input.name, shown, parts, written, links)
        stages.done()
    return as_result(case, fractions, scan.notes, seconds)


class _Dividing:
    """Networks applied to one scan; what one found is not looked for again by those that divide it further."""

    def __init__(self, scan: SlabScan, folder: Path, scratch: ExitStack, stages: Stages):
        self.scan, self.folder, self.scratch, self.stages = scan, folder, scratch, stages
        self.found: dict[StructureDiscoveryModel, StoredParts] = {}

    def divide(self, network: StructureDiscoveryModel, soft: bool) -> StoredParts:
        """The parts of a network, after those of the networks above it."""
        missing = [n for n in network.levels if n not in self.found]
        sides = {n: choose_window(self.scan.shape, n.config) for n in missing}
        total, done = sum(count_windows(self.scan.grid, side) for side in sides.values()), 0

        def on_window() -> None:
            nonlocal done
            done += 1
            self.stages.within(done, total, "window")

        for n in missing:
            self.found[n] = self._divide(n, sides[n], soft and n is network, on_window)
        return self.found[network]

    def _divide(self, network, side: int, soft: bool, on_window: Callable[[], None]) -> StoredParts:
        count = network.config.num_parts
        (labels,) = self._grids(1, np.dtype(np.uint8 if count <= 256 else np.uint16))
        probabilities = self._grids(count, np.dtype(np.float32)) if soft else None

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
        return StoredParts(labels, sums, probabilities, side, windows, np.arange(count))

    def _moments(self, sums: PartSums) -> torch.Tensor:
        """Mean and standard deviation in each part of the scan as networks see it: from 0 to 1."""
        mean, std = sums.moments()
        low, extent = float(self.scan.low), float(self.scan.high - self.scan.low)
        found = np.stack([(mean - low) / extent, std / extent], axis=1)
        return torch.from_numpy(np.nan_to_num(found).astype(np.float32))  # of an empty part nothing is to be seen

    def _grids(self, count: int, dtype: np.dtype) -> list[RawGrid]:
        """Room on disk for so many volumes on the scan's grid."""
        grid = self.scan.grid
        size = int(np.prod(grid.shape)) * dtype.itemsize
        file = self.scratch.enter_context(scratch_file(self.folder, count * size)).raw
        return [RawGrid(file, grid.shape, dtype, grid.orientation, i * size) for i in range(count)]


def largest(sums: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """For every voxel of (K, rows, columns) the part with the largest value, the first in a tie.

    What argmax gives, without its walking through memory voxel by voxel.
    """
    best, labels = sums[0].copy(), np.zeros(sums.shape[1:], dtype)
    for part, values in enumerate(sums[1:], start=1):
        labels[values > best] = part
        np.maximum(best, values, out=best)
    return labels


def write_stored_labels(path: Path, scan: SlabScan, found: StoredParts) -> None:
    """Write the label map of a scan on its own grid, as [`write_like`] writes one that is in memory."""
    header = output_header(scan.header, found.labels.dtype, found.labels.shape, labels=True)
    with nifti_stream(path, header) as write:
        for start, stop in found.labels.slabs():
            write(found.planes(start, stop).T)


def _write_soft(path: Path, scan: SlabScan, found: StoredParts) -> None:
    header = output_header(scan.header, np.dtype(np.float32), (*scan.grid.shape, len(found.soft)), labels=False)
    with nifti_stream(path, header) as write:
        for number in found.order:
            for start, stop in found.labels.slabs():
                write(found.soft[number].read_planes(start, stop).T)


def _look_at(found: StoredParts) -> Topology:
    topology = Topology(found.sums.num_parts)
    for start, stop in found.labels.slabs():
        topology.add(found.planes(start, stop))
    return topology


def _nest(stored: dict[int | None, StoredParts]) -> list[dict]:
    """The links of [`nest_levels`]."""
    links = []
    for coarse, fine in itertools.pairwise(stored):
        above, below = stored[coarse], stored[fine]
        counts = sum(
            count_pairs(below.planes(*slab), above.planes(*slab), below.sums.num_parts, above.sums.num_parts)
            for slab in above.labels.slabs()
        )
        links += nest_counts(fine, coarse, counts)
    return links


def _save_preview(path: Path, scan: SlabScan, stored: dict[int | None, StoredParts]) -> None:
    def middle(read: Callable) -> list[np.ndarray]:
        cuts = []
        for axis, length in enumerate(scan.shape):
            thin = [slice(0, n) for n in scan.shape]
            thin[axis] = slice(length // 2, length // 2 + 1)
            cuts.append(np.take(read(tuple(thin)), 0, axis=axis))
        return cuts

    grey = middle(scan.read)
    save_cuts(
        path,
        [grey] * len(stored),
        [[found.renumbered(cut) for cut in middle(found.labels.read)] for found in stored.values()],
        spacing_mm=scan.spacing_mm,
        titles=[f"level {level}" for level in stored] if len(stored) > 1 else None,
        num_parts=max(found.sums.num_parts for found in stored.values()),
    )

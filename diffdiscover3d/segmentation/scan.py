"""Segment one scan: find its parts at every level, and write all of its files or none."""

import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffdiscover3d.data.domain import domain_note, voxel_note
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.nifti.slabs import SlabScan
from diffdiscover3d.data.formats.registry import display_name
from diffdiscover3d.reporting.frames import Frame, frame_of
from diffdiscover3d.reporting.page import ShownLevel, ShownScan, shown_grid, shown_voxels, write_page
from diffdiscover3d.reporting.parts import PartStatistics, nest_counts
from diffdiscover3d.reporting.pictures import save_cuts
from diffdiscover3d.reporting.tables import (
    part_columns,
    statistics_columns,
    write_itksnap_labels,
    write_part_table,
    write_slicer_colours,
)
from diffdiscover3d.segmentation.in_memory import InMemoryFinder
from diffdiscover3d.segmentation.job import FoundParts, PartFinder, ScanJob, SegmentedFile
from diffdiscover3d.segmentation.out_of_core import OutOfCoreFinder
from diffdiscover3d.segmentation.outputs import LevelFiles, hash_outputs
from diffdiscover3d.segmentation.resampled import ResampledFinder
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import peak_memory_mib
from diffdiscover3d.utils.staging import staged_folder


@dataclass(frozen=True)
class ScanResults:
    """What was found in one scan; its files and its report are made from this.

    Attributes:
        scan: in memory or on disk.
        finder: that found the parts.
        found: the parts, by level.
        parts: the statistics of every part, by level.
        links: which part is nested in which, see [`nest_levels`].
        frame: unit and names of the axes of the scan.
    """

    scan: NiftiVolume | SlabScan
    finder: PartFinder
    found: dict[int | None, FoundParts]
    parts: dict[int | None, list[PartStatistics]]
    links: list[dict]
    frame: Frame


def segment_scan(job: ScanJob, scan: NiftiVolume | SlabScan) -> SegmentedFile:
    """Segment one scan at every level and write its results; on an error none of them is left, and older ones stay.

    Args:
        job: what to do, and which files to write.
        scan: in memory as [`read_volume`] reads it, or on disk as [`stream_volume`] opens it.

    Raises:
        InputError: if the scan's file changes while it is read by regions.
        MemoryLimitError: if the scan, or a window of it, does not fit into the device's memory.
        OutputError: if a file cannot be written, or the disk cannot hold the temporary files.
    """
    case = job.case
    with staged_folder(case.folder, job.overwrite) as folder, ExitStack() as scratch:

        def staged(path: Path) -> Path:
            return folder / path.name

        clock = time.perf_counter()
        frame = frame_of(scan.spacing_mm, scan.unit, scan.anatomical, job.neurological)
        finder = _make_finder(job, scan, folder, scratch)
        finder.notes += filter(None, notes_about(scan, job))
        found: dict[int | None, FoundParts] = {}
        parts: dict[int | None, list[PartStatistics]] = {}
        recorded: dict[int | None, dict] = {}
        for level, files in case.levels.items():
            job.stages.show(finding(level, case.levels))
            found[level] = finder.find(level)
            found[level].write(staged(files.labels), staged(files.probabilities) if files.probabilities else None)
            parts[level] = found[level].statistics(topology=job.extras.statistics or case.report is not None)
            listed = parts[level] if job.extras.statistics else [replace(p, components=None) for p in parts[level]]
            recorded[level] = {
                **_write_tables(files, staged, listed, frame, found[level].recorded),
                **found[level].recorded,
            }
            job.stages.done()
        job.stages.show("writing the results")
        results = ScanResults(scan, finder, found, parts, _nest(found), frame)
        if case.tree:
            write_json(staged(case.tree), {"input": display_name(case.input), "tree": results.links})
        if case.preview:
            _save_preview(staged(case.preview), results)
        finder.check_unchanged()
        seconds = job.read_seconds + time.perf_counter() - clock
        sidecars = _write_sidecars(job, staged, results, recorded, seconds)
        if case.report:
            _write_report(staged(case.report), display_name(case.input), results, sidecars)
        job.stages.done()
    first = next(iter(case.levels))
    return SegmentedFile(
        case.input,
        case.levels[first].labels,
        case.levels[first].sidecar,
        case.preview,
        _fractions(parts[first]),
        tuple(finder.notes),
        seconds,
        case.levels,
        case.tree,
        case.report,
    )


def _make_finder(job: ScanJob, scan: NiftiVolume | SlabScan, folder: Path, scratch: ExitStack) -> PartFinder:
    """What finds the parts of a scan: in memory or on disk, on its own grid or another one."""
    if isinstance(scan, NiftiVolume):
        return InMemoryFinder(job, scan)
    working, grid = job.working_grid, scan.shape
    if working is not None:
        grid = working.of(scan.shape, scan.spacing_mm, scan.unit, job.case.input)
    if grid == scan.shape:
        return OutOfCoreFinder(job, scan, folder, scratch)
    return ResampledFinder(job, scan, folder, scratch, grid)


def finding(level: int | None, levels: Collection) -> str:
    """Name of the operation that finds the parts of one of the levels."""
    return "finding the parts" + (f" of level {level}" if len(levels) > 1 else "")


def notes_about(scan: NiftiVolume | SlabScan, job: ScanJob) -> list[str | None]:
    """Notes for the user about this scan and the model: an unknown voxel size, another domain, stretched voxels."""
    working, about = job.working_grid, (scan, job.domain, job.model)
    return [
        working and working.note(scan.unit),
        domain_note(*about),
        voxel_note(*about) if working is None else None,  # a working grid has voxels of one size
    ]


def _fractions(parts: Sequence[PartStatistics]) -> tuple[float, ...]:
    total = sum(p.voxels for p in parts)
    return tuple(p.voxels / total for p in parts)


def _write_tables(
    files: LevelFiles, staged: Callable[[Path], Path], parts: Sequence[PartStatistics], frame: Frame, recorded: dict
) -> dict:
    """Write the tables of a level's parts; return the sidecar's entries about the parts and the table's columns."""
    background = recorded.get("background")
    background = background if background is None or isinstance(background, str) else "background"
    write_part_table(staged(files.table), parts, frame, background)
    if files.itksnap:
        write_itksnap_labels(staged(files.itksnap), len(parts), background)
    if files.slicer:
        write_slicer_colours(staged(files.slicer), len(parts), background)
    return {
        "parts": [{"index": k, "fraction": round(f, 6)} for k, f in enumerate(_fractions(parts))],
        **part_columns(frame),
        **(statistics_columns(frame) if parts[0].components is not None else {}),
    }


def _nest(found: Mapping[int | None, FoundParts]) -> list[dict]:
    """The links of [`nest_levels`]."""
    links = []
    for (coarse, above), (fine, below) in itertools.pairwise(found.items()):
        links += nest_counts(fine, coarse, below.count_pairs(above))
    return links


def _save_preview(path: Path, results: ScanResults) -> None:
    found = results.found
    save_cuts(
        path,
        [results.finder.middle_slices()] * len(found),
        [parts.middle_slices() for parts in found.values()],
        spacing_mm=results.scan.spacing_mm,
        titles=[f"level {level}" for level in found] if len(found) > 1 else None,
        num_parts=max(parts.num_parts for parts in found.values()),
        frame=results.frame,
    )


def _write_sidecars(
    job: ScanJob,
    staged: Callable[[Path], Path],
    results: ScanResults,
    recorded: Mapping[int | None, dict],
    seconds: float,
) -> dict[int | None, dict]:
    """Write the sidecar of every level; return their contents.

    Args:
        recorded: by level, the entries about its parts and its table.
    """
    scan = results.scan
    source = {"name": display_name(job.case.input), "sha256": scan.sha256, "shape": list(scan.header.get_data_shape())}
    orientation = scan.orientation if isinstance(scan, NiftiVolume) else scan.grid.orientation
    spacing = np.array(scan.spacing_mm)[orientation[:, 0].astype(int)]  # along the axes of the file, as the shape
    source["voxel_size"] = [round(float(s * results.frame.unit.per_mm), 6) for s in spacing]
    source["unit"] = results.frame.unit.length
    sidecars = {}
    for level, files in job.case.levels.items():
        sidecars[level] = {
            **job.provenance[level],
            "input": source,
            **recorded[level],
            "outputs": hash_outputs(files, staged(files.sidecar).parent),
            "notes": list(results.finder.notes),
            "seconds": round(seconds, 3),
            "peak_memory_mib": peak_memory_mib(),
        }
        write_json(staged(files.sidecar), sidecars[level])
    return sidecars


def _write_report(path: Path, name: str, results: ScanResults, sidecars: Mapping[int | None, dict]) -> None:
    """Write the report from what was found and measured; no result is read back."""
    scan = results.scan
    grid = shown_grid(scan.shape)
    picks = shown_voxels(scan.shape, grid)
    levels = [
        ShownLevel(
            level if len(results.found) > 1 else None, sidecars[level], results.parts[level], found.sample(picks)
        )
        for level, found in results.found.items()
    ]
    shown = ShownScan(name, scan.shape, scan.affine, results.finder.shrink(grid), scan.notes, results.frame)
    write_page(path, shown, levels, results.links)

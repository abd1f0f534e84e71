"""One scan: find its parts at every level, and write its files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffdiscover3d.data.formats.nifti.reading import NiftiVolume, write_like
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import MemoryLimitError, is_out_of_memory
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting.parts import PartStatistics, measure_parts, nest_levels, number_by_size
from diffdiscover3d.reporting.pictures import save_slices
from diffdiscover3d.reporting.tables import (
    COLUMNS,
    STATISTICS_COLUMNS,
    write_itksnap_labels,
    write_part_table,
    write_slicer_colours,
)
from diffdiscover3d.segmentation.outputs import CaseFiles, Extras, LevelFiles
from diffdiscover3d.utils.files import sha256, staged_folder, write_json
from diffdiscover3d.utils.progress import Stages
from diffdiscover3d.utils.provenance import peak_memory_mib

FAST_MIN_SIZE = 32  # voxels; where an axis is shorter, half of them would be too few


@dataclass(frozen=True)
class SegmentedFile:
    """One input and what was written for it; paths are `None` for what was not asked for.

    Attributes:
        input, preview, tree, report: paths.
        labels, sidecar: paths of the first level.
        levels: the files of every level.
        fractions: share of the voxels in each part of the first level.
        notes: what was unusual about the input.
        seconds: from reading to writing, without loading the model.
    """

    input: Path
    labels: Path
    sidecar: Path
    preview: Path | None
    fractions: tuple[float, ...]
    notes: tuple[str, ...]
    seconds: float
    levels: dict[int | None, LevelFiles]
    tree: Path | None = None
    report: Path | None = None


def label_scan(
    networks: dict[int | None, StructureDiscoveryModel],
    working: tuple[int, int, int] | None,
    case: CaseFiles,
    scan: NiftiVolume,
    provenance: dict[int | None, dict],
    extras: Extras,
    read_seconds: float,
    stages: Stages,
) -> SegmentedFile:
    """Label one scan at every level and write its results; if anything fails, none of what was written stays.

    Args:
        networks: by level.
        working: the grid the scan is brought to first; `None` for its own.
        case, extras: the files to write.
        provenance: of each level, for its sidecar; its "arguments" say how to label.
        read_seconds: how long the reading took.
        stages: told what is being done.

    Raises:
        MemoryLimitError: if the scan does not fit into the device's memory.
        OutputError: if a file cannot be written.
    """
    maps: dict[int | None, np.ndarray] = {}
    num_parts = {level: network.config.num_parts for level, network in networks.items()}
    notes = list(scan.notes)
    fractions: dict[int | None, tuple[float, ...]] = {}
    arguments = next(iter(provenance.values()))["arguments"]
    digest = sha256(case.input)
    # a label map without its sidecar would pass for a result; older results stay until all the new ones are written
    with staged_folder(next(iter(case)).parent) as folder:

        def staged(path: Path) -> Path:
            return folder / path.name

        clock = time.perf_counter()
        sidecars, coarser = {}, None
        for level, network in networks.items():
            stages.show("finding the parts" + (f" of level {level}" if len(networks) > 1 else ""))
            files = case.levels[level]
            soft, found = _probabilities(network, case.input, scan, arguments["fast"], working, notes, coarser)
            coarser = (network, found)  # the next level divides these parts: they need not be found again
            labels = soft.max(dim=0).indices.to(torch.uint8 if len(soft) <= 256 else torch.int32).cpu().numpy()
            labels = labels if labels.dtype == np.uint8 else labels.astype(np.uint16)
            if arguments["order"] == "size":
                numbers = number_by_size(labels, num_parts[level])
                labels = np.argsort(numbers).astype(labels.dtype)[labels]
                soft = soft[torch.as_tensor(numbers, device=soft.device)]
            maps[level] = labels
            write_like(staged(files.labels), labels, scan, labels=True)
            if files.probabilities:
                write_like(staged(files.probabilities), np.moveaxis(soft.cpu().numpy(), 0, -1), scan)
            del soft
            parts = measure_parts(labels, scan.data, scan.affine, num_parts[level], topology=extras.statistics)
            fractions[level], sidecars[level] = write_tables(files, staged, parts)
            stages.done()
        stages.show("writing the results")
        if case.tree:
            write_json(staged(case.tree), {"input": case.input.name, "tree": nest_levels(maps, num_parts)})
        if case.preview:
            titles = [f"level {level}" for level in maps] if len(maps) > 1 else None
            most, rows, found = max(num_parts.values()), [scan.data] * len(maps), list(maps.values())
            picture = staged(case.preview)
            save_slices(picture, rows, found, spacing_mm=scan.spacing_mm, titles=titles, num_parts=most)
        seconds = read_seconds + time.perf_counter() - clock
        write_sidecars(case, staged, scan.header, digest, provenance, sidecars, notes, seconds)
        if case.report:
            from diffdiscover3d.reporting.page import write_report

            label_maps = [staged(files.labels) for files in case.levels.values()]
            write_report(staged(case.report), scan, case.input.name, label_maps)
        stages.done()
    return as_result(case, fractions, notes, seconds)


def write_tables(
    files: LevelFiles, staged: Callable[[Path], Path], parts: Sequence[PartStatistics]
) -> tuple[tuple[float, ...], dict]:
    """Write the tables of a level's parts.

    Args:
        files: of the level.
        staged: says where a file is written before it moves to its place.
        parts: all of them.

    Returns:
        The share of each in the scan's voxels, and what the level's sidecar says about its parts and the table.
    """
    write_part_table(staged(files.table), parts)
    if files.itksnap:
        write_itksnap_labels(staged(files.itksnap), len(parts))
    if files.slicer:
        write_slicer_colours(staged(files.slicer), len(parts))
    total = sum(p.voxels for p in parts)
    fractions = tuple(p.voxels / total for p in parts)
    described = {
        "parts": [{"index": k, "fraction": round(f, 6)} for k, f in enumerate(fractions)],
        **COLUMNS,
        **(STATISTICS_COLUMNS if parts[0].components is not None else {}),
    }
    return fractions, described


def write_sidecars(
    case: CaseFiles,
    staged: Callable[[Path], Path],
    header,
    digest: str,
    provenance: dict[int | None, dict],
    sidecars: dict[int | None, dict],
    notes: Sequence[str],
    seconds: float,
) -> dict[int | None, dict]:
    """Write the sidecar of every level, and return what they say.

    Args:
        case: the scan and its files.
        staged: as for [`write_tables`].
        header, digest: of the scan's file, its header and its sha256.
        provenance, sidecars: of each level, how it was made and what it holds.
        notes, seconds: of the scan.
    """
    written = {}
    for level, files in case.levels.items():
        written[level] = {
            **provenance[level],
            "input": {"name": case.input.name, "sha256": digest, "shape": list(header.get_data_shape())},
            **sidecars[level],
            "notes": list(notes),
            "seconds": round(seconds, 3),
            "peak_memory_mib": peak_memory_mib(),
        }
        write_json(staged(files.sidecar), written[level])
    return written


def as_result(
    case: CaseFiles, fractions: dict[int | None, tuple[float, ...]], notes: Sequence[str], seconds: float
) -> SegmentedFile:
    """What was written for a scan, with the figures of its first level."""
    first = next(iter(case.levels))
    return SegmentedFile(
        case.input,
        case.levels[first].labels,
        case.levels[first].sidecar,
        case.preview,
        fractions[first],
        tuple(notes),
        seconds,
        case.levels,
        case.tree,
        case.report,
    )


def _probabilities(
    network, path: Path, scan: NiftiVolume, fast: bool, working, notes: list[str], coarser
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, H, W, D) soft parts; on a working grid, or with `fast` at half the resolution, linearly interpolated.

    Args:
        coarser: a network and the labels it found, which are used if it is this one's parent.

    Returns:
        The soft parts, and the labels on the grid on which they were found.
    """
    volume = torch.from_numpy(scan.data)
    grid = tuple(volume.shape)
    parents = {}
    if coarser is not None and getattr(network, "parent_model", None) is coarser[0]:
        parents["parent_labels"] = coarser[1]
    try:
        size = working or grid
        if fast and min(size) >= FAST_MIN_SIZE:
            size = tuple((n + 1) // 2 for n in size)
        if size != grid:
            found = network.segment(resize_volume(volume[None, None].to(network.device), size), **parents)
            soft = F.interpolate(found.probabilities, size=grid, mode="trilinear", align_corners=False)
            return soft[0], found.labels
        note = f"too small to be halved ({FAST_MIN_SIZE} voxels are needed along each axis); done at full resolution"
        if fast and not working and note not in notes:
            notes.append(note)
        found = network.segment(volume, **parents)
        return found.probabilities[0], found.labels
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"{path}: a volume of shape {grid} does not fit into the memory of {network.device}; "
            "use --fast, resample it, or use --device cpu or a larger machine."
        ) from error

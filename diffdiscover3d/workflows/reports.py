"""Write reports of scans and label maps on disk."""

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.formats.nifti.reading import NiftiVolume
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import display_name, folder_of, label_suffix, stem
from diffdiscover3d.data.transforms import resize_volume
from diffdiscover3d.errors import InputError
from diffdiscover3d.reporting.frames import frame_of
from diffdiscover3d.reporting.index_page import write_index
from diffdiscover3d.reporting.label_maps import LabelMap, is_result_of, read_label_map, read_sidecar
from diffdiscover3d.reporting.page import ShownLevel, ShownScan, shown_grid, shown_voxels, write_page
from diffdiscover3d.reporting.parts import PartStatistics, measure_parts, nest_levels
from diffdiscover3d.segmentation.outputs import relative_folders
from diffdiscover3d.utils.files import check_targets


def make_reports(
    inputs: str | Path | Sequence[str | Path],
    *,
    labels: Sequence[str | Path] | None = None,
    parts: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    neurological: bool = False,
    include: Sequence[str] = (),
    series: str | None = None,
    on_note: Callable[[str], None] = lambda line: None,
    **reading,
) -> list[Path]:
    """Write `<stem>_report.html` for each scan, and `index.html` if there are several.

    Args:
        inputs: scans, or folders, globs or lists of them.
        labels: label maps of the one scan given (default: `<stem>_dseg.nii.gz` or its levels).
        parts: folder of the label maps (default: beside each scan).
        output: folder for the reports (default: that of the label maps); as of `parts`, with the folders of the scans
            below it where scans have one name.
        overwrite: replace reports that exist.
        include, series: as for [`list_volumes`].
        on_note: called with a line of text for each note on a scan, such as label maps that were made of another one.
        reading: see [`read_volume`].

    Returns:
        The paths of the reports, the index last.

    Raises:
        InputError: if a scan has no label map, or one on another grid.
        OutputError: if a report exists or cannot be written.
    """
    sources = [inputs] if isinstance(inputs, str | Path) else inputs
    scans = [path for source in sources for path in list_volumes(source, include, series)]
    if labels and len(scans) != 1:
        raise InputError(f"--labels goes with a single scan, got {len(scans)}; use --parts FOLDER.")
    jobs = []
    ambiguous = len({stem(scan) for scan in scans}) < len(scans)  # then `segment` keeps the scans' folders
    folders = relative_folders(scans) if ambiguous else [Path()] * len(scans)
    for scan, kept in zip(scans, folders, strict=True):
        place = None if parts is None else Path(parts) / kept
        found = [Path(p) for p in labels] if labels else find_label_maps(scan, place)
        folder = Path(output) / kept if output is not None else found[0].parent
        jobs.append((scan, found, folder / f"{stem(scan)}_report.html"))
    pages = [page for _, _, page in jobs]
    if len(set(pages)) < len(pages):
        raise InputError("two scans of one folder and name would get the same page; report them apart.")
    above = pages[0].parent if output is None else Path(output)
    if output is None and ambiguous:
        above = Path(os.path.commonpath([os.path.abspath(page.parent) for page in pages]))
    index = [above / "index.html"] if len(pages) > 1 else []
    check_targets([*pages, *index], overwrite)
    for scan, found, page in jobs:
        volume = read_volume(scan, series=series, **reading)
        for note in write_report(page, volume, display_name(scan), found, neurological):
            on_note(f"{scan}: note: {note}")
    for path in index:
        write_index(path, pages)
    return [*pages, *index]


def write_report(
    path: str | Path,
    scan: NiftiVolume,
    name: str,
    label_maps: Sequence[str | Path],
    neurological: bool = False,
) -> list[str]:
    """Write the report of a scan from label maps on disk; return the notes on it.

    Args:
        path: the HTML file.
        scan: as read from its file.
        name: of the scan, as the page shows it.
        label_maps: paths of its label maps, one per level.
        neurological: show the patient's left on the left.

    Raises:
        InputError: see [`read_label_map`].
        OutputError: if it cannot be written.
    """
    maps = [read_label_map(p, scan) for p in label_maps]
    grid = shown_grid(scan.shape)
    picks = shown_voxels(scan.shape, grid)
    levels = [
        ShownLevel(
            m.level,
            m.provenance,
            _parts_of(m, scan),
            m.labels[np.ix_(*picks)],
        )
        for m in maps
    ]
    numbered = {m.level: m for m in maps if m.level is not None}
    links = _nest(numbered)
    frame = frame_of(scan.spacing_mm, scan.unit, scan.anatomical, neurological)
    image = resize_volume(torch.from_numpy(scan.data)[None, None], grid)[0, 0].numpy()
    notes = [*scan.notes, *(note for m in maps for note in m.notes)]
    write_page(path, ShownScan(name, scan.shape, scan.affine, image, notes, frame), levels, links)
    return notes


def _parts_of(found: LabelMap, scan: NiftiVolume) -> list[PartStatistics]:
    """The parts of a label map; of one without a sidecar only those that it contains."""
    listed = range(found.num_parts) if found.provenance else np.unique(found.labels)
    labels = np.searchsorted(listed, found.labels)
    parts = measure_parts(labels, scan.data, scan.affine, len(listed), topology=True)
    return [
        replace(part, index=int(number), neighbours=tuple(int(listed[n]) for n in part.neighbours))
        for number, part in zip(listed, parts, strict=True)
    ]


def _nest(levels: dict[int, LabelMap]) -> list[dict]:
    """The links of [`nest_levels`] between the parts that the label maps contain."""
    present = {level: np.unique(found.labels) for level, found in levels.items()}
    dense = {level: np.searchsorted(present[level], found.labels) for level, found in levels.items()}
    links = nest_levels(dense, {level: len(numbers) for level, numbers in present.items()})
    for link in links:
        link["part"] = int(present[link["level"]][link["part"]])
        link["parent"] = int(present[link["parent_level"]][link["parent"]])
    return links


def find_label_maps(scan: Path, parts: str | Path | None = None) -> list[Path]:
    """The label maps that `segment` wrote for a scan, by level.

    Raises:
        InputError: if there are none.
    """
    folder = folder_of(scan) if parts is None else Path(parts)
    name, suffix = glob.escape(stem(scan)), label_suffix(scan)
    found = sorted(folder.glob(f"{name}_level-*_dseg{suffix}")) or sorted(folder.glob(f"{name}_dseg{suffix}"))
    found = [path for path in found if is_result_of(path, stem(scan)) and not _is_of_another(path, scan)]
    found = found or sorted(folder.glob(f"{name}_dseg{suffix}"))
    if not found:
        raise InputError(
            f"{scan}: no {stem(scan)}_dseg{suffix} in {folder}; run segment first, or give --parts FOLDER."
        )
    return found


def _is_of_another(label_map: Path, scan: Path) -> bool:
    """Whether a label map was made of another scan, as `a_level-1` beside `a`."""
    source = read_sidecar(label_map).get("input")
    recorded = source.get("name") if isinstance(source, dict) else None
    return isinstance(recorded, str) and stem(recorded) != stem(display_name(scan))

"""Write reports of scans and label maps on disk."""

import glob
from collections.abc import Sequence
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
from diffdiscover3d.reporting.label_maps import read_label_map
from diffdiscover3d.reporting.page import ShownLevel, ShownScan, shown_grid, shown_voxels, write_page
from diffdiscover3d.reporting.parts import measure_parts, nest_levels
from diffdiscover3d.utils.files import check_targets


def make_reports(
    inputs: str | Path | Sequence[str | Path],
    *,
    labels: Sequence[str | Path] | None = None,
    parts: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    neurological: bool = False,
    **reading,
) -> list[Path]:
    """Write `<stem>_report.html` for each scan, and `index.html` if there are several.

    Args:
        inputs: scans, or folders, globs or lists of them.
        labels: label maps of the one scan given (default: `<stem>_dseg.nii.gz` or its levels).
        parts: folder of the label maps (default: beside each scan).
        output: folder for the reports (default: that of the label maps).
        overwrite: replace reports that exist.
        reading: see [`read_volume`].

    Returns:
        The paths of the reports, the index last.

    Raises:
        InputError: if a scan has no label map, or one on another grid.
        OutputError: if a report exists or cannot be written.
    """
    sources = [inputs] if isinstance(inputs, str | Path) else inputs
    scans = [path for source in sources for path in list_volumes(source)]
    if labels and len(scans) != 1:
        raise InputError(f"--labels goes with a single scan, got {len(scans)}; use --parts FOLDER.")
    jobs = []
    for scan in scans:
        found = [Path(p) for p in labels] if labels else find_label_maps(scan, parts)
        folder = Path(output) if output is not None else found[0].parent
        jobs.append((scan, found, folder / f"{stem(scan)}_report.html"))
    pages = [page for _, _, page in jobs]
    if len(set(pages)) < len(pages):
        raise InputError("two scans of one name would get the same page; report them into two --output folders.")
    index = [pages[0].parent / "index.html"] if len(pages) > 1 else []
    check_targets([*pages, *index], overwrite)
    for scan, found, page in jobs:
        write_report(page, read_volume(scan, **reading), display_name(scan), found, neurological)
    for path in index:
        write_index(path, pages)
    return [*pages, *index]


def write_report(
    path: str | Path,
    scan: NiftiVolume,
    name: str,
    label_maps: Sequence[str | Path],
    neurological: bool = False,
) -> None:
    """Write the report of a scan from label maps on disk.

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
            measure_parts(m.labels, scan.data, scan.affine, m.num_parts, topology=True),
            m.labels[np.ix_(*picks)],
        )
        for m in maps
    ]
    numbered = {m.level: m for m in maps if m.level is not None}
    links = nest_levels(
        {level: m.labels for level, m in numbered.items()}, {level: m.num_parts for level, m in numbered.items()}
    )
    frame = frame_of(scan.spacing_mm, scan.unit, scan.anatomical, neurological)
    image = resize_volume(torch.from_numpy(scan.data)[None, None], grid)[0, 0].numpy()
    write_page(path, ShownScan(name, scan.shape, scan.affine, image, scan.notes, frame), levels, links)


def find_label_maps(scan: Path, parts: str | Path | None = None) -> list[Path]:
    """The label maps that `segment` wrote for a scan, by level.

    Raises:
        InputError: if there are none.
    """
    folder = folder_of(scan) if parts is None else Path(parts)
    name, suffix = glob.escape(stem(scan)), label_suffix(scan)
    found = sorted(folder.glob(f"{name}_level-*_dseg{suffix}")) or sorted(folder.glob(f"{name}_dseg{suffix}"))
    if not found:
        raise InputError(
            f"{scan}: no {stem(scan)}_dseg{suffix} in {folder}; run segment first, or give --parts FOLDER."
        )
    return found

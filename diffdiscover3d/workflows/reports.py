"""Reports of scans that were segmented before."""

import glob
from collections.abc import Sequence
from pathlib import Path

from diffdiscover3d.data.datasets.folder import list_volumes
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.errors import InputError
from diffdiscover3d.reporting.index_page import write_index
from diffdiscover3d.reporting.page import write_report
from diffdiscover3d.segmentation.outputs import stem
from diffdiscover3d.utils.files import check_targets


def make_reports(
    inputs: str | Path | Sequence[str | Path],
    *,
    labels: Sequence[str | Path] | None = None,
    parts: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    **reading,
) -> list[Path]:
    """Write `<stem>_report.html` for each scan, and `index.html` if there are several.

    Args:
        inputs: scans, or folders, globs or lists of them.
        labels: label maps of the one scan given (default: `<stem>_dseg.nii.gz` or its levels).
        parts: folder of the label maps (default: beside each scan).
        output: folder for the pages (default: that of the label maps).
        overwrite: replace pages that exist.
        reading: `volume`, `nan_to_zero`, `ignore_affine` of [`read_nifti`].

    Returns:
        The pages, the index last.

    Raises:
        InputError: if a scan has no label map, or one that does not lie on it.
        OutputError: if a page exists or cannot be written.
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
        write_report(page, read_nifti(scan, **reading), scan.name, found)
    for path in index:
        write_index(path, pages)
    return [*pages, *index]


def find_label_maps(scan: Path, parts: str | Path | None = None) -> list[Path]:
    """The label maps that `segment` wrote for a scan, by level.

    Raises:
        InputError: if there are none.
    """
    folder = scan.parent if parts is None else Path(parts)
    name = glob.escape(stem(scan))
    found = sorted(folder.glob(f"{name}_level-*_dseg.nii.gz")) or sorted(folder.glob(f"{name}_dseg.nii.gz"))
    if not found:
        raise InputError(f"{scan}: no {stem(scan)}_dseg.nii.gz in {folder}; run segment first, or give --parts FOLDER.")
    return found

"""Label maps that are returned instead of written: of volumes in memory, and of files."""

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from diffdiscover3d.data.formats.nifti.output import output_header
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.hub.resolve import ResolvedModel, resolve_model
from diffdiscover3d.segmentation.arrays import NAME, as_scan
from diffdiscover3d.segmentation.device import choose_device
from diffdiscover3d.segmentation.files import check_options
from diffdiscover3d.segmentation.finish import Finish
from diffdiscover3d.segmentation.job import ScanJob, SegmentedFile
from diffdiscover3d.segmentation.outputs import CaseFiles, Extras
from diffdiscover3d.utils.progress import ProgressBar

logger = logging.getLogger("diffdiscover3d")


def segment_volume(
    scan,
    /,
    *,
    model: str | ResolvedModel,
    revision: str | None,
    level: int | str | None,
    num_parts: int | None,
    device: str,
    fast: bool,
    order: str,
    mask: str | Path | None,
    smooth: float,
    min_size: int,
    background: int | None,
    nan_to_zero: bool,
    progress: bool,
    on_progress: Callable[[float, str], None] | None,
    **_,
):
    """Label maps of a volume in memory, see [`segment`], whose other arguments are about files.

    Args:
        scan: an array, a tensor or an image.

    Returns:
        A label map of its kind; with level "all" a dict of them by level.
    """
    from diffdiscover3d.segmentation.in_memory import InMemoryFinder
    from diffdiscover3d.segmentation.scan import finding, notes_about

    finish = Finish(None if mask is None else Path(mask), smooth, min_size, background)
    scan, back = as_scan(scan, nan_to_zero=nan_to_zero)
    found = resolve_model(model, revision)
    levels = found.choose_levels(level, num_parts)
    check_options(finish, [NAME], None, levels, False)
    case = CaseFiles(NAME, {}, None, None, None)
    with ProgressBar(len(levels) + 1, progress, callback=on_progress) as stages:
        stages.show("loading the model")
        networks = found.load(levels, choose_device(device))
        stages.done()
        own = {"finish": finish, "domain": found.domain, "model": found.name}
        job = ScanJob(case, networks, {}, Extras(), order, fast, found.working_grid, 0.0, stages, **own)
        finder = InMemoryFinder(job, scan)
        labels = {}
        for one in levels:
            stages.show(finding(one, levels))
            labels[one] = back(finder.find(one).labels)
            stages.done()
    for note in filter(None, [*finder.notes, *notes_about(scan, job)]):
        logger.warning("%s: %s", NAME, note)
    return labels if level == "all" else next(iter(labels.values()))


def label_images(result: SegmentedFile) -> dict[int | None, nib.Nifti1Image]:
    """The label maps that were written for a file as images in memory, by level; notes about the file are logged.

    Returns:
        Images of uint8, or uint16 where there are more than 256 parts, with the axes and the place of the file.
    """
    for note in result.notes:
        logger.warning("%s: %s", result.input, note)
    images = {}
    for level, files in result.levels.items():
        written = read_volume(files.labels, allow_constant=True)
        stored = written.to_input_grid(written.data)
        labels = stored.astype(np.uint8 if stored.max() < 256 else np.uint16)
        header = output_header(written.header, labels.dtype, labels.shape, labels=True)
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        images[level] = kind(labels, header.get_best_affine(), header)
    return images

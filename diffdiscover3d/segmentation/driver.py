"""Segment volumes: label maps, tables and reports on each input's own grid.

Nothing here imports torch before the first scan is segmented.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from diffdiscover3d.data.formats.registry import split
from diffdiscover3d.errors import DiffDiscoverError
from diffdiscover3d.hub.resolve import ResolvedModel, resolve_model
from diffdiscover3d.models.embedded import DEFAULT_MODEL
from diffdiscover3d.segmentation.arrays import is_in_memory
from diffdiscover3d.segmentation.device import choose_device
from diffdiscover3d.segmentation.files import segment_files
from diffdiscover3d.segmentation.job import SegmentedFile
from diffdiscover3d.segmentation.labels import label_images, segment_volume

__all__ = ["SegmentedFile", "choose_device", "segment"]

ORDERS = ("model", "size")
_OF_FILES = ("preview", "statistics", "tables", "probabilities", "report", "overwrite", "resume", "share", "summary")


def segment(
    inputs,
    output: str | Path | None = None,
    *,
    beside_inputs: bool = False,
    model: str | ResolvedModel = DEFAULT_MODEL,
    level: int | str | None = None,
    revision: str | None = None,
    device: str = "auto",
    fast: bool = False,
    order: str = "model",
    preview: bool = False,
    statistics: bool = False,
    tables: bool = False,
    probabilities: bool = False,
    report: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    volume: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    series: str | None = None,
    resolution: int = 0,
    missing_chunks: bool = False,
    voxel_size: str | None = None,
    include: Sequence[str] = (),
    neurological: bool = False,
    num_parts: int | None = None,
    mask: str | Path | None = None,
    smooth: float = 0.0,
    min_size: int = 0,
    background: int | None = None,
    share: str | None = None,
    summary: bool = False,
    progress: bool = False,
    on_progress: Callable[[float, str], None] | None = None,
    on_done: Callable[[SegmentedFile], None] | None = None,
    on_error: Callable[[DiffDiscoverError], None] | None = None,
    on_skip: Callable[[Path], None] | None = None,
    on_estimate: Callable[[str], None] | None = None,
    on_left_out: Callable[[str], None] | None = None,
):
    """Segment volumes into parts: return label maps, or write `<stem>_dseg.nii.gz`, `.json` and `.tsv` for each.

    Without an output nothing is written, and labels are returned; with one, the results are written there.

    A scan too large for one pass of the network stays on disk and is segmented slab by slab, in memory bounded by its
    planes (see `models/window_layout.py`), also if it is resampled to the target spacing of a model. With `fast`,
    `mask`, `smooth` or `min_size`, and for models that scale intensities by percentiles, it is read into memory.

    If several processes were started by `accelerate launch` or torchrun, each works on its share of the inputs; so do
    separate commands with `share`.

    Args:
        inputs: an (H, W, D) array or tensor, a nibabel or SimpleITK image, or a list of these; or volumes of any
            format (see `data/formats/registry.py`), folders of them, globs or lists, see [`list_volumes`].
        output: folder for the results, or, for one input and level, the label map; only for files. If scans in
            different folders have one name, the results keep these folders.
        beside_inputs: write the results of each file beside it, as the command does by default.
        model: an embedded model's name, a folder, a Hub id, or a [`ResolvedModel`], whose networks are loaded once for
            several calls.
        level: of a model with levels: its number, 1 the coarsest (default 2), or "all"; then the files are called
            `<stem>_level-<L>_dseg.*`, and `<stem>_tree.json` lists how the parts are nested.
        revision: of a Hub repository.
        device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:N" or "mps".
        fast: segment at half the resolution and upsample the probabilities; about 8 times fewer voxels.
        order: number parts as the "model" does, so that a number means the same in every scan, or by their "size"
            in each scan: largest first, ties by centroid.
        preview: also write `<stem>_dseg.png`, three slices with the parts overlaid, a row per level.
        statistics: also measure spread, centroid, components and neighbours of every part.
        tables: also write colour tables for ITK-SNAP (`.label`) and 3D Slicer (`.ctbl`).
        probabilities: also write `<stem>_probseg.nii.gz`, (h, w, d, K) float32.
        report: also write `<stem>_report.html`, a page with a viewer that needs no network.
        overwrite: replace results that exist; the input itself is never overwritten.
        resume: skip inputs whose results exist, made from the same file by the same model and arguments.
        volume, nan_to_zero, ignore_affine: how to read unusual files, see [`read_nifti`].
        series, resolution, missing_chunks: the same, see [`ReadOptions`].
        voxel_size: of files that give none, along their own axes, as "0.1,0.1,0.3um".
        include: patterns of file names that are taken though they are named like masks.
        neurological: pictures and reports show the patient's left on the left, instead of on the right.
        num_parts: take the level with so many parts, instead of naming it.
        mask: a file on the grid of the one scan given; only where it is not 0 are parts looked for, and they are
            numbered from 1: 0 is what is outside.
        smooth: standard deviation, in voxels, of a Gaussian filter of the probabilities.
        min_size: voxels below which a connected piece of a part becomes part of what surrounds it.
        background: the part that becomes 0 and is called background; the others follow in their order.
        share: "i/n": work on the i-th of n shares of the inputs, i from 1; each process of a launch on its part of it.
        summary: also write `manifest.tsv`, a row for each scan, and `parts.tsv`, a row for each part of each scan, into
            `output`; implies `statistics`. A scan that cannot be used gets a file `<stem>_dseg_error.json`.
        progress: show a progress bar with the current step and the time left; for a list of volumes in memory one each.
        on_progress: progress callback, called with the completed share in [0, 1] and the current operation; an
            exception that it raises ends the work and leaves no files of the current input.
        on_done: called with the result of each input.
        on_estimate: called with a line about the memory that a large volume needs, before it is read.
        on_error: called with the error of an input that cannot be used, before the next one; default: raise it.
        on_skip: called with each input that `resume` skips.
        on_left_out: called with a line for each reason for which files were not taken as scans.

    Returns:
        With an output, a list of [`SegmentedFile`]: what was written for each input. Otherwise labels, uint8 (uint16
        with more than 256 parts), on the grid of the input: of an array or tensor an (H, W, D) array, of an image an
        image of its library, of a file a nibabel image, whose axes are x, y, z and whose affine is in mm. With level
        "all" it is a dict of them by level. A list of volumes, a folder, a glob or a list of files gets a list, in the
        order of the volumes.

    Raises:
        InputError, OutputError, ModelError, NetworkError, MemoryLimitError: see their descriptions.
        ValueError: for an unknown device or order, or options that write files without an output.
    """
    options = {name: value for name, value in locals().items() if name not in ("inputs", "output", "beside_inputs")}
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}, got {order!r}.")
    several = isinstance(inputs, Sequence) and not isinstance(inputs, str)
    in_memory = any(map(is_in_memory, inputs)) if several else is_in_memory(inputs)
    if in_memory and (output is not None or beside_inputs):
        raise ValueError("a volume in memory gets labels in memory; save it to a file for an `output`.")
    if output is not None or beside_inputs:
        return segment_files(inputs, output, **options)
    if given := [name for name in (*_OF_FILES, "on_done") if options[name]]:
        raise ValueError(f"`{given[0]}` is about files that are written; name an `output`, or set `beside_inputs`.")
    if in_memory and several:
        options["model"] = resolve_model(model, revision)  # loaded once for all volumes
        return [
            segment(one, **options | {"on_progress": _of_one(on_progress, number, len(inputs))})
            for number, one in enumerate(inputs)
        ]
    if in_memory:
        return segment_volume(inputs, **options)
    with tempfile.TemporaryDirectory(prefix="diffdiscover3d-") as folder:
        results = segment_files(inputs, folder, **options)
        found = [label_images(result) for result in results]
    found = found if level == "all" else [next(iter(images.values())) for images in found]
    return found[0] if not several and _is_one_volume(inputs, results) else found


def _of_one(on_progress: Callable[[float, str], None] | None, number: int, count: int):
    """The progress callback of one of several volumes, which scales its share to that of all of them."""
    return on_progress and (lambda share, operation: on_progress((number + share) / count, operation))


def _is_one_volume(source: str | Path, results: Sequence[SegmentedFile]) -> bool:
    """Whether what was given is the path of a volume, rather than a folder, glob or list that holds one."""
    return len(results) == 1 and split(results[0].input)[0] == split(source)[0]

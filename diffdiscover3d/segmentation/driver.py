"""Segment files: label maps, tables and reports on each input's own grid.

What imports torch is imported when the first scan is segmented: `resume` with nothing left to do needs none of it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiscover3d import __version__
from diffdiscover3d.data.datasets.listing import describe_left_out, expand_all
from diffdiscover3d.data.formats.reading import Source, grid_of, open_source, read_source, stream_source
from diffdiscover3d.data.formats.registry import (
    options_in,
    stem,
    volume_sha256,
)
from diffdiscover3d.data.formats.units import parse_voxel_size
from diffdiscover3d.errors import DiffDiscoverError, ModelError, NetworkError
from diffdiscover3d.hub.resolve import ResolvedModel, resolve_model
from diffdiscover3d.models.embedded import DEFAULT_MODEL
from diffdiscover3d.segmentation.arrays import NAME, as_scan, is_in_memory
from diffdiscover3d.segmentation.cohort import Cohort
from diffdiscover3d.segmentation.device import choose_device, is_device_name
from diffdiscover3d.segmentation.finish import Finish
from diffdiscover3d.segmentation.job import ScanJob, SegmentedFile
from diffdiscover3d.segmentation.outputs import (
    CaseFiles,
    Extras,
    check_cases,
    is_finished,
    names_a_file,
    plan_cases,
    shard,
)
from diffdiscover3d.segmentation.preflight import MemoryPlan, plan_memory
from diffdiscover3d.utils.files import check_folder
from diffdiscover3d.utils.progress import ProgressBar
from diffdiscover3d.utils.staging import recover_folder

if TYPE_CHECKING:
    from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel

__all__ = ["SegmentedFile", "choose_device", "segment", "stem"]

ORDERS = ("model", "size")
logger = logging.getLogger("diffdiscover3d")


def segment(
    inputs,
    output: str | Path | None = None,
    *,
    model: str = DEFAULT_MODEL,
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
    """Segment volumes into parts and write `<stem>_dseg.nii.gz`, `.json` and `.tsv` for each.

    A scan too large for one pass of the network stays on disk and is segmented slab by slab, in memory bounded by its
    planes (see `models/window_layout.py`); with `fast`, or a model with a working grid, it is read into memory.

    If several processes were started by `accelerate launch` or torchrun, each works on its share of the inputs; so do
    separate commands with `share`.

    A volume in memory gets a label map in memory, of the same kind: nothing is written.

    Args:
        inputs: an (H, W, D) array or tensor, a nibabel or SimpleITK image; or volumes of any format (see
            `data/formats/registry.py`), folders of them, globs or lists, see [`list_volumes`].
        output: folder for the results (default: beside each input), or, for one input and level, the label map. If
            scans in different folders have one name, the results keep these folders.
        model: an embedded model's name, a folder, or a Hub id.
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
        progress: show a progress bar with the current step and the time left.
        on_progress: progress callback, called with the completed share in [0, 1] and the current operation; an
            exception that it raises ends the work and leaves no files of the current input.
        on_done: called with the result of each input.
        on_estimate: called with a line about the memory that a large volume needs, before it is read.
        on_error: called with the error of an input that cannot be used, before the next one; default: raise it.
        on_skip: called with each input that `resume` skips.
        on_left_out: called with a line for each reason for which files were not taken as scans.

    Returns:
        What was written for each input; of a volume in memory the label map, or with level "all" a dict of them.

    Raises:
        InputError, OutputError, ModelError, NetworkError, MemoryLimitError: see their descriptions.
        ValueError: for an unknown device or order.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}, got {order!r}.")
    statistics = statistics or summary
    if is_in_memory(inputs):
        if output is not None or report or preview or probabilities or statistics or tables or share:
            raise ValueError("a volume in memory gets labels in memory: save it to a file for other results.")
        finish = Finish(None if mask is None else Path(mask), smooth, min_size, background)
        chosen = {"model": model, "level": level, "num_parts": num_parts, "revision": revision}
        return _segment_in_memory(inputs, chosen, device, fast, order, finish, nan_to_zero)
    contents = expand_all([inputs] if isinstance(inputs, str | Path) else inputs, include, series)
    paths = contents.volumes
    for line in describe_left_out(contents) if on_left_out else ():
        on_left_out(line)
    place = None if resume and is_device_name(device) else choose_device(device)
    if output is not None:
        check_folder(Path(output).parent if names_a_file(output) else Path(output))
    found = resolve_model(model, revision)
    levels = found.choose_levels(level) if num_parts is None else (_level_with(found, num_parts, level),)
    finish = Finish(None if mask is None else Path(mask), smooth, min_size, background)
    _check_options(finish, paths, output, levels, probabilities)
    if summary and (output is None or names_a_file(output)):
        raise ValueError("`summary` needs an `output` folder for its tables.")
    extras = Extras(preview, statistics, tables, probabilities, report)
    cases = plan_cases(paths, output, levels, extras)
    mine = shard(cases, share)
    for folder in {case.folder for case in cases}:
        recover_folder(folder)
    check_cases(cases, mine, overwrite or resume, resume)
    if not all(target.exists() for case in mine for target in case):
        place = place or choose_device(device)
    reading = {"volume": volume, "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}
    arguments = {"device": None, **reading, "fast": fast, "order": order, "statistics": statistics}
    unusual = {"series": series, "resolution": resolution, "missing_chunks": missing_chunks}
    if voxel_size is not None:
        parse_voxel_size(voxel_size)
    unusual["voxel_size"] = voxel_size
    reading |= unusual
    arguments |= {name: value for name, value in unusual.items() if value} | finish.recorded()

    config = found.level_config(levels[-1])
    networks: dict[int | None, StructureDiscoveryModel] = {}
    provenance: dict[int | None, dict] = {}
    results = []

    def describe() -> dict[int | None, dict]:
        return {level: _provenance(found, level, arguments) for level in levels}

    cohort = Cohort(Path(output), cases, describe) if summary else None
    total = len(mine) * (len(levels) + 2)
    with ProgressBar(total, progress, callback=on_progress) as stages, cohort or nullcontext():
        for number, case in enumerate(mine):
            stages.begin_case(f"scan {number + 1} of {len(mine)}", len(levels) + 2)
            try:
                stages.show("reading the scan")
                clock = time.perf_counter()
                own = reading | options_in(case.input)
                if resume and all(target.exists() for target in case):
                    # neither the scan nor the model has to be read for this
                    provenance = provenance or describe()
                    if is_finished(case, provenance, volume_sha256(case.input)):
                        if on_skip:
                            on_skip(case.input)
                        continue
                place = place or choose_device(device)
                from diffdiscover3d.segmentation.scan import segment_scan

                with ExitStack() as opened:
                    file = opened.enter_context(open_source(case.input, **own))
                    plan = MemoryPlan(False, None)  # without a complete configuration nothing is estimated
                    if config is not None:
                        plan = plan_memory(
                            file,
                            config,
                            place.type == "cpu",
                            fast=fast,
                            working=_resampled(found, file),
                            whole=finish.in_memory,
                        )
                    if plan.line and on_estimate:
                        on_estimate(plan.line)
                    # all of the scan is checked before a model is loaded: a bad file is reported at once
                    if plan.by_slabs:
                        scan = opened.enter_context(stream_source(file, case.folder, **own))
                    else:
                        scan = read_source(file, **own)
                    read_seconds = time.perf_counter() - clock
                    if not networks:
                        stages.show("loading the model")
                        networks = found.load(levels, place)
                        arguments["device"] = str(place)
                        provenance = describe()
                    stages.done()
                    job = ScanJob(
                        case,
                        networks,
                        provenance,
                        extras,
                        order,
                        fast,
                        found.working_grid,
                        read_seconds,
                        stages,
                        neurological,
                        overwrite or resume,
                        domain=found.domain,
                        model=found.name,
                        finish=finish,
                    )
                    result = segment_scan(job, scan)
            except DiffDiscoverError as error:
                if cohort and not isinstance(error, ModelError | NetworkError):
                    cohort.failed(case, error)
                # a model that cannot be loaded fails for every input
                if on_error is None or isinstance(error, ModelError | NetworkError):
                    raise
                on_error(error)
                continue
            results.append(result)
            if cohort:
                cohort.finished(case)
            if on_done:
                on_done(result)
    return results


def _segment_in_memory(volume, chosen: dict, device: str, fast: bool, order: str, finish: Finish, nan_to_zero: bool):
    """Label maps of a volume in memory, see [`segment`]."""
    from diffdiscover3d.segmentation.in_memory import InMemoryFinder
    from diffdiscover3d.segmentation.scan import notes_about

    scan, back = as_scan(volume, nan_to_zero=nan_to_zero)
    found = resolve_model(chosen["model"], chosen["revision"])
    if chosen["num_parts"] is None:
        levels = found.choose_levels(chosen["level"])
    else:
        levels = (_level_with(found, chosen["num_parts"], chosen["level"]),)
    _check_options(finish, [NAME], None, levels, False)
    networks = found.load(levels, choose_device(device))
    case = CaseFiles(NAME, {}, None, None, None)
    with ProgressBar(total=1, enabled=False) as stages:
        own = {"finish": finish, "domain": found.domain, "model": found.name}
        job = ScanJob(case, networks, {}, Extras(), order, fast, found.working_grid, 0.0, stages, **own)
        finder = InMemoryFinder(job, scan)
        labels = {level: back(finder.find(level).labels) for level in levels}
    for note in filter(None, [*finder.notes, *notes_about(scan, job)]):
        logger.warning("%s: %s", NAME, note)
    return labels if chosen["level"] == "all" else next(iter(labels.values()))


def _level_with(model: ResolvedModel, num_parts: int, level: int | str | None) -> int | None:
    """The level that has so many parts."""
    if level is not None:
        raise ValueError("give either `level` or `num_parts`.")
    known = {one: (model.level_config(one) or {}).get("num_parts") for one in model.levels or (None,)}
    fitting = [one for one, count in known.items() if count == num_parts]
    if not fitting:
        counts = ", ".join(str(count) for count in known.values())
        raise ValueError(f"`num_parts` must be one of {counts} for {model.name}, got {num_parts}.")
    return fitting[0]


def _check_options(finish: Finish, paths: Sequence[Path], output, levels: Sequence, probabilities: bool) -> None:
    """Refuse combinations of options that mean nothing."""
    if output is not None and names_a_file(output) and len(paths) != 1:
        raise ValueError(f"`output` {output} is one file for {len(paths)} inputs; name a folder.")
    if finish.mask is not None and (len(paths) != 1 or probabilities):
        raise ValueError("`mask` goes with one input, and without `probabilities`.")
    if finish.background is not None and len(levels) != 1:
        raise ValueError("`background` goes with one level.")


def _resampled(model: ResolvedModel, file: Source) -> tuple[int, int, int] | None:
    """The grid to which an open scan is resampled; `None` if it keeps its own."""
    if model.working_grid is None:
        return None
    shape, spacing, unit = grid_of(file)
    grid = model.working_grid.of(shape, spacing, unit, file.path)
    return None if grid == shape else grid


def _provenance(model: ResolvedModel, level: int | None, arguments: dict) -> dict:
    """What a sidecar records about how its label map was made."""
    return {
        "diffdiscover3d": __version__,
        "model": model.describe(level),
        "arguments": arguments,
        "seed": None,  # nothing is drawn at random
    }

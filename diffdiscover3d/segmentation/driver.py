"""Segment files: label maps, tables and reports on each input's own grid."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from diffdiscover3d import __version__
from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.formats.nifti.header import check_reachable
from diffdiscover3d.data.formats.reading import open_source, read_source, stream_source
from diffdiscover3d.data.formats.registry import format_by_name, is_nifti, is_volume, options_in, split, stem
from diffdiscover3d.data.formats.units import parse_voxel_size
from diffdiscover3d.errors import DiffDiscoverError, ModelError, NetworkError
from diffdiscover3d.hub.registry import DEFAULT_MODEL
from diffdiscover3d.hub.resolve import ResolvedModel, resolve_model
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.segmentation.job import ScanJob, SegmentedFile
from diffdiscover3d.segmentation.outputs import Extras, check_cases, is_finished, plan_case, shard
from diffdiscover3d.segmentation.preflight import MemoryPlan, plan_memory
from diffdiscover3d.segmentation.scan import segment_scan
from diffdiscover3d.utils.files import check_folder
from diffdiscover3d.utils.progress import ProgressBar
from diffdiscover3d.utils.staging import recover_folder

__all__ = ["SegmentedFile", "choose_device", "segment", "stem"]

ORDERS = ("model", "size")


def segment(
    inputs: str | Path | Sequence[str | Path],
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
    progress: bool = False,
    on_done: Callable[[SegmentedFile], None] | None = None,
    on_error: Callable[[DiffDiscoverError], None] | None = None,
    on_skip: Callable[[Path], None] | None = None,
    on_estimate: Callable[[str], None] | None = None,
) -> list[SegmentedFile]:
    """Segment volumes into parts and write `<stem>_dseg.nii.gz`, `.json` and `.tsv` for each.

    A scan too large for one pass of the network stays on disk and is segmented slab by slab, in memory bounded by its
    planes (see `models/window_layout.py`); with `fast`, or a model with a working grid, it is read into memory.

    If several processes were started by `accelerate launch` or torchrun, each works on its share of the inputs.

    Args:
        inputs: volumes of any format (see `data/formats/registry.py`), folders of them, globs or text lists.
        output: folder for the results (default: beside each input).
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
        progress: show a progress bar with the current step and the time left.
        on_done: called with the result of each input.
        on_estimate: called with a line about the memory that a large volume needs, before it is read.
        on_error: called with the error of an input that cannot be used, before the next one; default: raise it.
        on_skip: called with each input that `resume` skips.

    Raises:
        InputError, OutputError, ModelError, NetworkError, MemoryLimitError: see their descriptions.
        ValueError: for an unknown device or order.
    """
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}, got {order!r}.")
    single = isinstance(inputs, str | Path)
    paths = [p for source in ([inputs] if single else inputs) for p in _expand(source, include, series)]
    place = choose_device(device)
    if output is not None:
        check_folder(Path(output))
    found = resolve_model(model, revision)
    levels = found.choose_levels(level)
    extras = Extras(preview, statistics, tables, probabilities, report)
    cases = [plan_case(path, output, levels, extras) for path in paths]
    mine = shard(cases)
    for folder in {case.folder for case in cases}:
        recover_folder(folder)
    check_cases(cases, mine, overwrite or resume)
    reading = {"volume": volume, "nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine}
    arguments = {"device": str(place), **reading, "fast": fast, "order": order, "statistics": statistics}
    unusual = {"series": series, "resolution": resolution, "missing_chunks": missing_chunks}
    if voxel_size is not None:
        parse_voxel_size(voxel_size)
    unusual["voxel_size"] = voxel_size
    reading |= unusual
    arguments |= {name: value for name, value in unusual.items() if value}

    config = found.level_config(levels[-1])
    networks: dict[int | None, StructureDiscoveryModel] = {}
    provenance: dict[int | None, dict] = {}
    results = []
    with ProgressBar(total=len(mine) * (len(levels) + 2), enabled=progress) as stages:
        for number, case in enumerate(mine):
            stages.begin_case(f"scan {number + 1} of {len(mine)}", len(levels) + 2)
            try:
                stages.show("reading the scan")
                clock = time.perf_counter()
                own = reading | options_in(case.input)
                with ExitStack() as opened:
                    file = opened.enter_context(open_source(case.input, **own))
                    plan = MemoryPlan(False, None)  # without a complete configuration nothing is estimated
                    if config is not None:
                        plan = plan_memory(file, config, place.type == "cpu", fast=fast, working=found.working_grid)
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
                        provenance = {level: _provenance(found, level, arguments) for level in levels}
                    if resume and is_finished(case, provenance, scan.sha256):
                        if on_skip:
                            on_skip(case.input)
                        continue
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
                    )
                    result = segment_scan(job, scan)
            except DiffDiscoverError as error:
                # no other input can be segmented without the model either
                if on_error is None or isinstance(error, ModelError | NetworkError):
                    raise
                on_error(error)
                continue
            results.append(result)
            if on_done:
                on_done(result)
    return results


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is a CUDA device if there is one, otherwise the CPU.

    Raises:
        ValueError: if the device is unknown or missing on this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # the processes of one launch share the devices of the machine
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`device` must be auto, cpu, cuda, cuda:N or mps, got {name!r}.") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ValueError(f"`device` {name!r} is not available on this machine; use auto or cpu.")
    return device


def _expand(source: str | Path, include: Sequence[str], series: str | None) -> list[Path]:
    path, inner = split(source)
    check_reachable(path)
    # a single file is passed on as it is: reading it gives the most precise reason if it cannot be used
    if (
        not path.is_dir()
        and (is_nifti(path) or format_by_name(path) or inner)
        and not any(c in str(path) for c in "*?[")
    ):
        return [Path(source)]
    named = path.suffix != "" or path.is_dir() or not path.exists()
    return list_volumes(source, include, series) if named or is_volume(path) else [path]


def _provenance(model: ResolvedModel, level: int | None, arguments: dict) -> dict:
    """What a sidecar records about how its label map was made."""
    return {
        "diffdiscover3d": __version__,
        "model": model.describe(level),
        "arguments": arguments,
        "seed": None,  # nothing is drawn at random
    }

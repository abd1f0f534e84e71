"""The loop over the scans of `segment`: each is read, segmented, and its results are written.

What imports torch is imported when the first scan is segmented: `resume` with nothing left to do needs none of it.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from diffdiscover3d import __version__
from diffdiscover3d.data.datasets.listing import describe_left_out, expand_all
from diffdiscover3d.data.formats.reading import Source, grid_of, open_source, read_source, stream_source
from diffdiscover3d.data.formats.registry import options_in, volume_sha256
from diffdiscover3d.data.formats.units import parse_voxel_size
from diffdiscover3d.errors import DiffDiscoverError, ModelError, NetworkError
from diffdiscover3d.hub.resolve import ResolvedModel, resolve_model
from diffdiscover3d.segmentation.cohort import Cohort
from diffdiscover3d.segmentation.device import choose_device, is_device_name
from diffdiscover3d.segmentation.finish import Finish
from diffdiscover3d.segmentation.job import ScanJob, SegmentedFile
from diffdiscover3d.segmentation.outputs import (
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


def segment_files(
    inputs,
    output: str | Path | None,
    *,
    model: str | ResolvedModel,
    level: int | str | None,
    revision: str | None,
    device: str,
    fast: bool,
    order: str,
    preview: bool,
    statistics: bool,
    tables: bool,
    probabilities: bool,
    report: bool,
    overwrite: bool,
    resume: bool,
    volume: int | None,
    nan_to_zero: bool,
    ignore_affine: bool,
    series: str | None,
    resolution: int,
    missing_chunks: bool,
    voxel_size: str | None,
    include: Sequence[str],
    neurological: bool,
    num_parts: int | None,
    mask: str | Path | None,
    smooth: float,
    min_size: int,
    background: int | None,
    share: str | None,
    summary: bool,
    progress: bool,
    on_progress: Callable[[float, str], None] | None,
    on_done: Callable[[SegmentedFile], None] | None,
    on_error: Callable[[DiffDiscoverError], None] | None,
    on_skip: Callable[[Path], None] | None,
    on_estimate: Callable[[str], None] | None,
    on_left_out: Callable[[str], None] | None,
) -> list[SegmentedFile]:
    """Segment volumes of files, see [`segment`] for the arguments and the errors.

    If several processes were started by `accelerate launch` or torchrun, each works on its share of the inputs; so do
    separate commands with `share`.

    Returns:
        What was written for each input.
    """
    statistics = statistics or summary
    contents = expand_all([inputs] if isinstance(inputs, str | Path) else inputs, include, series)
    paths = contents.volumes
    for line in describe_left_out(contents) if on_left_out else ():
        on_left_out(line)
    place = None if resume and is_device_name(device) else choose_device(device)
    if output is not None:
        check_folder(Path(output).parent if names_a_file(output) else Path(output))
    found = resolve_model(model, revision)
    levels = found.choose_levels(level, num_parts)
    finish = Finish(None if mask is None else Path(mask), smooth, min_size, background)
    check_options(finish, paths, output, levels, probabilities)
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


def check_options(finish: Finish, paths: Sequence[Path], output, levels: Sequence, probabilities: bool) -> None:
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

"""Plan, train both phases on a folder of scans, segment them and report; every step can be resumed."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.datasets.listing import list_volumes
from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS
from diffdiscover3d.data.domain import DOMAIN_FILE, signature, summarise
from diffdiscover3d.data.formats.nifti.reading import write_like
from diffdiscover3d.data.formats.reading import read_volume
from diffdiscover3d.data.formats.registry import SEPARATOR, volume_sha256, with_options
from diffdiscover3d.data.formats.units import IN_MM, UNKNOWN, parse_voxel_size
from diffdiscover3d.errors import DiffDiscoverError, InputError, ModelError, NothingToDivideError, OutputError
from diffdiscover3d.segmentation.arrays import as_scan
from diffdiscover3d.segmentation.driver import SegmentedFile, choose_device, segment
from diffdiscover3d.segmentation.outputs import Extras, check_cases, plan_cases
from diffdiscover3d.training.recipes import Training, diffusion_training, train_level
from diffdiscover3d.utils.files import atomic_file, atomic_folder, check_folder, write_json
from diffdiscover3d.utils.memory import free_memory
from diffdiscover3d.utils.signals import run_child
from diffdiscover3d.workflows.discover_plan import Plan, describe_plan, make_fallback, make_plan, make_recipe, read_plan


def discover(
    source,
    output: str | Path,
    *,
    preset: str = "standard",
    levels: int = 3,
    device: str = "auto",
    seed: int = 0,
    spacing: str | Sequence[float] | None = None,
    volume: int | None = None,
    resolution: int | None = None,
    nan_to_zero: bool = False,
    ignore_affine: bool = False,
    missing_chunks: bool = False,
    voxel_size: str | None = None,
    series: str | None = None,
    include: Sequence[str] = (),
    resume: bool = False,
    progress: bool = False,
    verbose: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    on_error: Callable[[DiffDiscoverError], None] | None = None,
) -> list[SegmentedFile]:
    """Train on a folder of scans without labels, segment them, and write reports.

    Args:
        source: a folder, glob or text list of volumes of any format; or a sequence of volumes in memory, as [`segment`]
            takes them, which are kept in `scans/` of the output.
        output: folder for all files: `plan.json`, `training/` (checkpoints, logs, pictures), `model/` (what
            `segment --model` takes: the diffusion model and one network with all levels), `parts/` (label maps, tables
            and reports; with the folders of the scans below it if scans in different folders have one name) and
            `index.html`.
        preset: "quick" (a first look), "standard", or "paper" (the paper's diffusion model; needs a GPU).
        levels: number of levels, 1 to 3 (2, 4, 8 parts); each divides the parts of the level before.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        seed: of everything random.
        spacing: target size of a voxel along the canonical axes, to which all scans are resampled: three numbers in mm,
            or one length or three with a unit as "5,5,40nm". Default: that of nnU-Net, see [`target_spacing`],
            coarsened until the preset can process a scan. If a scan gives no voxel size, it is counted in voxels.
        volume: of files with several channels or time points, which one.
        resolution: of files with several resolutions, which one, 0 the finest.
        nan_to_zero, ignore_affine, missing_chunks, voxel_size, series, include: as for [`segment`].
        resume: continue an earlier run with the same output; its plan is kept.
        progress: show progress bars.
        verbose: show the logs of the trainings.
        tell: progress callback, called with a line when a step begins.
        on_error: called with the error of a scan that cannot be read, before the next one; default: raise it.

    Raises:
        InputError: if no scan can be read, or one has changed since the run began.
        OutputError: if `output` holds an earlier run and `resume` is not set.
        ModelError: if a training fails, or the earlier run was of other scans.
    """
    output = Path(output)
    check_folder(output)
    place = choose_device(device)
    plan_file = output / "plan.json"
    if plan_file.exists() and not resume:
        raise OutputError(f"{output}: holds an earlier run; --resume continues it, or choose another --output folder.")
    tell("Reading the scans")
    if isinstance(source, str | Path):
        paths = list_volumes(source, include, series)
    else:
        paths = _keep_volumes(source, output / "scans", nan_to_zero)
    paths = [with_options(path, volume=volume, resolution=resolution) for path in paths]
    given = _target_in_mm(spacing)
    reading = {"nan_to_zero": nan_to_zero, "ignore_affine": ignore_affine, "missing_chunks": missing_chunks}
    reading = {name: value for name, value in {**reading, "voxel_size": voxel_size}.items() if value}
    scans, shapes, spacings, units, sha256, domain = _read_all(paths, reading, on_error)
    if plan_file.exists():
        plan = read_plan(plan_file)
        if [_location(scan) for scan in plan.scans] != [_location(scan) for scan in scans]:
            raise ModelError(f"{plan_file}: is of other scans than {source}; choose another --output folder.")
        if plan.reading != reading:
            raise ModelError(
                f"{plan_file}: its scans were read with the options {plan.reading}, now with {reading}; give the same "
                "options, or choose another --output folder."
            )
        _check_unchanged(plan, sha256)
    else:
        memory = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else free_memory()
        unit = "voxel" if UNKNOWN in units else "mm"
        if given is not None and unit != "mm":
            raise ValueError("`spacing` needs the voxel size of every scan, and one gives none; leave it out.")
        options = {"preset": preset, "levels": levels, "seed": seed, "spacing": given, "spacing_unit": unit}
        plan = make_plan(shapes, spacings, scans, memory_bytes=memory, **options)
        plan = replace(plan, sha256=tuple(sha256), reading=reading)
        write_json(plan_file, asdict(plan))
    tell(describe_plan(plan))
    # fail fast, and not after the trainings
    extras = Extras(preview=True, statistics=True, tables=True, report=True)
    numbers = tuple(range(1, plan.levels + 1)) if plan.levels > 1 else (None,)
    cases = plan_cases([Path(scan) for scan in plan.scans], output / "parts", numbers, extras)
    check_cases(cases, cases, overwrite=True, resume=True)

    _train_all(plan, domain, output, place, verbose, tell)
    _check_unchanged(plan)
    model, total = output / "model", plan.levels + 2
    tell(f"Step {total} of {total}: drawing the parts of every scan")
    results = segment(
        list(plan.scans),
        output / "parts",
        model=str(model),
        level="all",
        device=device,
        **vars(extras),
        resume=True,
        include=include,
        **plan.reading,
        progress=progress,
        on_error=on_error,
    )
    from diffdiscover3d.reporting.index_page import write_index

    pages = [case.report for case in cases if case.report.exists()]
    write_index(output / "index.html", pages, title="Parts found in your scans")
    return results


def _check_unchanged(plan: Plan, sha256: Sequence[str] | None = None) -> None:
    """Compare the scans with those of the plan, so that all trainings and results are of the same ones.

    Args:
        sha256: of the scans; default: read again.
    """
    now = [volume_sha256(scan) for scan in plan.scans] if sha256 is None else sha256
    for scan, before, after in zip(plan.scans, plan.sha256 or now, now, strict=True):
        if before != after:
            raise InputError(
                f"{scan}: has changed since this run began; restore it, or start anew in another --output folder."
            )


def _read_all(
    paths: Sequence[Path], reading: dict, on_error
) -> tuple[list[str], list, list, set[str], list[str], dict]:
    """Read every scan once, so that a damaged one is reported before the trainings."""
    scans, shapes, spacings, units, hashes, signatures = [], [], [], set(), [], []
    for path in paths:
        try:
            volume = read_volume(path, **reading)
        except DiffDiscoverError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        place, inner = str(path).partition(SEPARATOR)[::2]
        # a link keeps its name: git-annex and the Hub's cache link to files whose names are hashes
        scans.append(str(Path(place).absolute()) + (f"{SEPARATOR}{inner}" if inner else ""))
        shapes.append(volume.data.shape)
        spacings.append(volume.spacing_mm)
        units.add(volume.unit)
        hashes.append(volume.sha256)
        signatures.append(signature(volume))
    if not scans:
        raise InputError("none of the scans can be read.")
    return scans, shapes, spacings, units, hashes, summarise(signatures, spacings)


def _location(scan: str) -> tuple[Path, str]:
    """Where a scan is on disk, however its path is written."""
    place, inner = scan.partition(SEPARATOR)[::2]
    return Path(place).resolve(), inner


def _target_in_mm(spacing: str | Sequence[float] | None) -> tuple[float, ...] | None:
    """A target spacing in mm, from three numbers in mm or lengths with a unit.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(spacing, str):
        edges, unit = parse_voxel_size(spacing, "spacing")
        return tuple(edge * IN_MM[unit] for edge in edges)
    if spacing is not None and (len(spacing) != 3 or not min(spacing) > 0):
        raise ValueError(f"`spacing` must be three positive numbers, got {spacing}.")
    return None if spacing is None else tuple(map(float, spacing))


def _keep_volumes(volumes: Sequence, folder: Path, nan_to_zero: bool) -> list[Path]:
    """Write volumes in memory as files, so that a run can be continued; those that are there stay.

    Images become NIfTI; arrays, which have no voxel size, NumPy files.
    """
    paths = []
    for number, one in enumerate(volumes):
        if isinstance(one, str | Path):
            paths.append(Path(one))
            continue
        scan, _ = as_scan(one, nan_to_zero=nan_to_zero)
        sized = scan.unit != UNKNOWN
        paths.append(folder / f"scan-{number:03d}.{'nii.gz' if sized else 'npy'}")
        if paths[-1].exists():
            continue
        if sized:
            write_like(paths[-1], scan.data, scan)
        else:
            with atomic_file(paths[-1], ".npy") as temporary:
                np.save(temporary, scan.data)
    return paths


def _train_all(
    plan: Plan, domain: dict, output: Path, place: torch.device, verbose: bool, tell: Callable[[str], None]
) -> None:
    """Run the trainings that are not finished, and copy the trained models to `model/`."""
    training, model, total = output / "training", output / "model", plan.levels + 2
    listed = output / "scans.json"
    write_json(listed, plan.scans)
    recipe, dataset = make_recipe(plan), str(listed.resolve())
    tell(f"Step 1 of {total}: learning what your scans look like ({plan.diffusion_steps} rounds)")
    teacher = diffusion_training(recipe, dataset, plan.seed, training / "diffusion")
    _train(teacher, "model_index.json", place, verbose, plan)
    parent = None
    for level, steps in enumerate(plan.discovery_steps, start=1):
        rounds = sum(steps) + steps[0] * (recipe.starts_of(level) - 1)
        tell(f"Step {level + 1} of {total}: learning to tell {LEVEL_PARTS[level]} parts apart ({rounds} rounds)")
        folder = training / f"level{level}"

        def run(training: Training) -> None:
            _train(training, "selection.json", place, verbose, plan)

        used = recipe
        try:
            done = train_level(used, level, dataset, plan.seed, str(teacher.folder), parent, folder, run)
        except NothingToDivideError:
            tell(f"Step {level + 1} of {total}: the parts have no inclusions; dividing them by their intensities")
            used = make_fallback(plan)
            done = train_level(used, level, dataset, plan.seed, str(teacher.folder), parent, folder, run)
        if (starts := used.starts_of(level)) > 1:
            tell(f"Of {starts} starts {Path(done[starts].options['init_from']).name} had the lowest loss")
        parent = folder
    _take_over(teacher.folder, model / "diffusion")
    # beside the network, which needs it
    _take_over(parent, model / "discovery", {DOMAIN_FILE: domain})


def _take_over(trained: Path, target: Path, also: dict[str, dict] | None = None) -> None:
    """Copy a trained model without checkpoints and logs."""
    if target.exists():
        return
    with atomic_folder(target) as folder:
        ignored = shutil.ignore_patterns("checkpoints", "options.json", "log.jsonl", ".lock")
        shutil.copytree(trained, folder, ignore=ignored, dirs_exist_ok=True)
        for name, values in (also or {}).items():
            write_json(folder / name, values)


def _train(training: Training, result: str, place: torch.device, verbose: bool, plan: Plan) -> None:
    """Run a training in its own process, from its last checkpoint, unless it is finished."""
    folder = training.folder
    if (folder / result).exists():
        return
    _check_unchanged(plan)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "options.json"
    options = {**training.options, "output_dir": folder}
    write_json(file, {k: str(v) if isinstance(v, Path) else v for k, v in options.items()})
    command = [sys.executable, "-m", "diffdiscover3d.train", training.phase, "--config", str(file)]
    command += ["--part-of-discover", *([] if verbose else ["--quiet"])]
    environment = dict(os.environ)
    if place.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    elif place.type == "cuda" and place.index is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(place.index)
    code, interrupted = run_child(command, environment)
    if interrupted or code == 130:
        raise KeyboardInterrupt
    if code == NothingToDivideError.exit_code:
        raise NothingToDivideError(f"{folder}: no volume has inclusions to assign.")
    if code:
        raise ModelError(
            f"{folder}: the training stopped with exit code {code}, see above; --resume goes on from its last "
            "checkpoint."
        )

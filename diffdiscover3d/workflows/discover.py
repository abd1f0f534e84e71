"""Plan, train both phases on a folder of scans, segment them and report; every step can be resumed."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS
from diffdiscover3d.data.domain import DOMAIN_FILE
from diffdiscover3d.errors import DiffDiscoverError, ModelError, NothingToDivideError
from diffdiscover3d.hub.registry import load_teacher
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.segmentation.driver import SegmentedFile, segment
from diffdiscover3d.segmentation.outputs import Extras, check_cases, plan_cases
from diffdiscover3d.training.recipes import Training, diffusion_training, train_level
from diffdiscover3d.utils.files import atomic_folder, write_json
from diffdiscover3d.utils.signals import run_child
from diffdiscover3d.workflows.discover_output import DiscoverOutput
from diffdiscover3d.workflows.discover_plan import Plan, make_fallback, make_recipe
from diffdiscover3d.workflows.discover_scans import DiscoverRun, check_unchanged, prepare


def discover(
    source,
    output: str | Path | None = None,
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
    on_step: Callable[[str], None] = lambda line: None,
    on_error: Callable[[DiffDiscoverError], None] | None = None,
) -> list[SegmentedFile] | DiscoverOutput:
    """Train on scans without labels and segment them; write models, label maps and reports, or return them.

    Without an output nothing is left behind: the trainings use a temporary folder, and an interrupted one is lost.

    Args:
        source: a folder, glob or text list of volumes of any format; or a volume in memory or a sequence of them, as
            [`segment`] takes them, which are kept in `scans/` of the output.
        output: folder for all files, or `None`: `plan.json`, `training/` (checkpoints, logs, pictures), `model/` (what
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
        on_step: progress callback, called with a line of text when a step begins.
        on_error: called with the error of a scan that cannot be read, before the next one; default: raise it.

    Returns:
        What was written for each scan, or without an output the models and label maps, see [`DiscoverOutput`].

    Raises:
        InputError: if no scan can be read, or one has changed since the run began.
        ValueError: for an unknown option, or `resume` without an output.
        OutputError: if `output` holds an earlier run and `resume` is not set.
        ModelError: if a training fails, or the earlier run was of other scans.
    """
    options = {name: value for name, value in locals().items() if name not in ("source", "output", "progress")}
    if output is not None:
        return _discover_into(Path(output), source, progress=progress, **options)
    if resume:
        raise ValueError("`resume` continues the run of an `output` folder; name it.")
    with tempfile.TemporaryDirectory(prefix="diffdiscover3d-") as folder:
        return _discover_in_memory(Path(folder), source, progress=progress, **options)


def _discover_into(
    output: Path, source, *, include, progress: bool, on_step, on_error, **options
) -> list[SegmentedFile]:
    """Train, and write the results of all scans and reports to `output`."""
    run = prepare(output, source, include=include, on_step=on_step, on_error=on_error, **options)
    # fail fast, and not after the trainings
    extras = Extras(preview=True, statistics=True, tables=True, report=True)
    levels = run.plan.levels
    numbers = tuple(range(1, levels + 1)) if levels > 1 else (None,)
    cases = plan_cases([Path(scan) for scan in run.plan.scans], output / "parts", numbers, extras)
    check_cases(cases, cases, overwrite=True, resume=True)

    model = _train_all(run, on_step)
    results = segment(
        list(run.plan.scans),
        output / "parts",
        model=str(model),
        level="all",
        device=run.device,
        **vars(extras),
        resume=True,
        include=include,
        **run.plan.reading,
        progress=progress,
        on_error=on_error,
    )
    from diffdiscover3d.reporting.index_page import write_index

    pages = [case.report for case in cases if case.report.exists()]
    write_index(output / "index.html", pages, title="Parts found in your scans")
    return results


def _discover_in_memory(folder: Path, source, *, progress: bool, on_step, **options) -> DiscoverOutput:
    """Train in a folder, and return the models and the label maps of all scans."""
    run = prepare(folder, source, on_step=on_step, **options)
    folder, labels = _train_all(run, on_step), []
    model = resolve_model(str(folder))  # loaded once for all scans
    for scan in run.plan.scans:
        reading = run.plan.reading
        if (volume := run.volumes.get(scan)) is not None:
            scan, reading = volume, {"nan_to_zero": options["nan_to_zero"]}
        found = segment(scan, model=model, level="all", device=run.device, progress=progress, **reading)
        labels.append({level or 1: one for level, one in found.items()})
    finest = list(model.load(model.choose_levels("all"), run.place).values())[-1]
    return DiscoverOutput(finest.cpu(), load_teacher(str(folder)), labels, run.domain)


def _train_all(run: DiscoverRun, on_step: Callable[[str], None]) -> Path:
    """Run the trainings that are not finished, and copy the trained models to `model/`, which is returned."""
    plan, output, place, verbose = run.plan, run.output, run.place, run.verbose
    training, model, total = output / "training", output / "model", plan.levels + 2
    listed = output / "scans.json"
    write_json(listed, plan.scans)
    recipe, dataset = make_recipe(plan), str(listed.resolve())
    on_step(f"Step 1 of {total}: learning what your scans look like ({plan.diffusion_steps} rounds)")
    teacher = diffusion_training(recipe, dataset, plan.seed, training / "diffusion")
    _train(teacher, "model_index.json", place, verbose, plan)
    parent = None
    for level, steps in enumerate(plan.discovery_steps, start=1):
        rounds = sum(steps) + steps[0] * (recipe.starts_of(level) - 1)
        on_step(f"Step {level + 1} of {total}: learning to tell {LEVEL_PARTS[level]} parts apart ({rounds} rounds)")
        folder = training / f"level{level}"

        def train(training: Training) -> None:
            _train(training, "selection.json", place, verbose, plan)

        used = recipe
        try:
            done = train_level(used, level, dataset, plan.seed, str(teacher.folder), parent, folder, train)
        except NothingToDivideError:
            on_step(f"Step {level + 1} of {total}: the parts have no inclusions; dividing them by their intensities")
            used = make_fallback(plan)
            done = train_level(used, level, dataset, plan.seed, str(teacher.folder), parent, folder, train)
        if (starts := used.starts_of(level)) > 1:
            on_step(f"Of {starts} starts {Path(done[starts].options['init_from']).name} had the lowest loss")
        parent = folder
    _take_over(teacher.folder, model / "diffusion")
    # beside the network, which needs it
    _take_over(parent, model / "discovery", {DOMAIN_FILE: run.domain})
    check_unchanged(plan)
    on_step(f"Step {total} of {total}: drawing the parts of every scan")
    return model


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
    check_unchanged(plan)
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
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # the index counts in it
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place.index] if visible else str(place.index)
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

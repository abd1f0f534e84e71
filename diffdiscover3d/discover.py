"""From scans to pictures in one go: plan, train both stages, segment, report. Every step can be resumed."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.data.folder import list_volumes
from diffdiscover3d.data.nifti import read_nifti
from diffdiscover3d.data.synthetic import LEVEL_PARTS
from diffdiscover3d.errors import DiffDiscoverError, InputError, ModelError, OutputError
from diffdiscover3d.files import atomic_folder, check_folder, write_json
from diffdiscover3d.memory import free_memory
from diffdiscover3d.segmentation import WORKING_GRID_FILE, SegmentedFile, choose_device, segment
from diffdiscover3d.training.recipes import RECIPES, Recipe, Training, diffusion_training, discovery_trainings

_STRIDE = 8  # of the diffusion models: their grid is a multiple of it
_BYTES_PER_VOXEL = 6_000  # of a training step of the small networks: a guess on the safe side, not a measurement

# Voxels of the grids are cubes of these edges at most; `rounds` scales the steps of the recipe's discovery trainings.
# `quick` is for a first look within minutes on two CPU cores.
PRESETS = {
    "quick": {"network": "small", "grid": 32, "volume": 50, "batch": 2, "diffusion": 300, "rounds": 0.25},
    "standard": {"network": "small", "grid": 48, "volume": 96, "batch": 4, "diffusion": 2_500, "rounds": 1.0},
    "paper": {"network": "paper", "grid": 64, "volume": 160, "batch": 4, "diffusion": 50_000, "rounds": 2.0},
}
_RECIPE = RECIPES["small"]  # the nested one: what it learns at a level divides the parts of the level before


@dataclass(frozen=True)
class Plan:
    """What will be trained on which scans; written to `plan.json`, and read back from it when resumed.

    Attributes:
        scans: absolute paths.
        preset: of `PRESETS`.
        median_shape, median_spacing_mm: of the scans in canonical orientation.
        diffusion_grid: internal grid of the diffusion model.
        working_grid: scans are brought to it for the segmentation network; `None` if all have one shape that fits.
        batch_size: volumes in a step of the diffusion model.
        diffusion_steps: optimiser steps of the diffusion model.
        discovery_steps: for each level, the optimiser steps of its trainings, which follow one another.
        levels: how many; level L has 2^L parts, each of which lies in one of the level before.
        seed: of everything random.
    """

    scans: tuple[str, ...]
    preset: str
    median_shape: tuple[int, int, int]
    median_spacing_mm: tuple[float, float, float]
    diffusion_grid: tuple[int, int, int]
    working_grid: tuple[int, int, int] | None
    batch_size: int
    diffusion_steps: int
    discovery_steps: tuple[tuple[int, ...], ...]
    levels: int
    seed: int


def make_plan(
    shapes: Sequence[Sequence[int]],
    spacings_mm: Sequence[Sequence[float]],
    scans: Sequence[str],
    *,
    preset: str = "standard",
    memory_bytes: int,
    levels: int = 3,
    seed: int = 0,
) -> Plan:
    """Choose grids, batch and steps for these scans.

    The grids have the proportions of the median scan and no more voxels than the preset's cube; the batch, and then
    the grid, shrink until a training step fits into half the memory.

    Raises:
        ValueError: for an unknown preset, or a number of levels that cannot be learnt.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {tuple(PRESETS)}, got {preset!r}.")
    if not 1 <= levels <= len(LEVEL_PARTS):
        raise ValueError(f"`levels` must be 1 to {len(LEVEL_PARTS)}, got {levels}.")
    options = PRESETS[preset]
    median = tuple(int(n) for n in np.median(np.asarray(shapes), axis=0))
    grid = _shrink(median, options["grid"], multiple=_STRIDE)
    # a network of the paper's width needs 4 times the channels, so about 4 times the memory
    bytes_per_voxel = _BYTES_PER_VOXEL * (4 if options["network"] == "paper" else 1)
    batch = min(options["batch"], max(1, len(shapes)))
    while batch > 1 and batch * math.prod(grid) * bytes_per_voxel > memory_bytes / 2:
        batch //= 2
    edge = options["grid"]
    while max(grid) > 2 * _STRIDE and math.prod(grid) * bytes_per_voxel > memory_bytes / 2:
        edge -= _STRIDE
        grid = _shrink(median, edge, multiple=_STRIDE)
    edge = options["volume"]
    while edge > 16 and edge**3 * _BYTES_PER_VOXEL > memory_bytes / 2:
        edge -= 8
    working = _shrink(median, edge)
    steps = tuple(
        tuple(max(1, round(step["max_steps"] * options["rounds"])) for step in _RECIPE.levels[level])
        for level in range(1, levels + 1)
    )
    same = all(tuple(s) == working for s in shapes)
    return Plan(
        tuple(scans),
        preset,
        median,
        tuple(round(float(s), 4) for s in np.median(np.asarray(spacings_mm), axis=0)),
        grid,
        None if same else working,
        batch,
        options["diffusion"],
        steps,
        levels,
        seed,
    )


def discover(
    source: str | Path,
    output: str | Path,
    *,
    preset: str = "standard",
    levels: int = 3,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: bool = False,
    verbose: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    on_error: Callable[[DiffDiscoverError], None] | None = None,
) -> list[SegmentedFile]:
    """Learn the parts of a folder of scans from these scans alone, and show them.

    Args:
        source: a folder, glob or text list of NIfTI files.
        output: folder for everything: `plan.json`, `training/` (checkpoints, logs, pictures), `model/` (what
            `segment --model` takes: the diffusion model and one network with all levels), `parts/` (label maps, tables
            and reports) and `index.html`.
        preset: "quick" (a first look), "standard", or "paper" (the paper's diffusion model; wants a GPU).
        levels: how many, 1 to 3 (2, 4, 8 parts); each divides the parts of the one before.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        seed: of everything random.
        resume: go on where an earlier run with the same output stopped; its plan is kept.
        progress: show bars; verbose: show the log of the trainings.
        tell: called with a line when a step begins.
        on_error: called with the error of a scan that cannot be read, and the others go on; without it, it raises.

    Raises:
        InputError: if no scan can be read.
        OutputError: if `output` holds an earlier run and `resume` is not set.
        ModelError: if a training fails, or the earlier run was of other scans.
    """
    output = Path(output)
    check_folder(output)
    place = choose_device(device)
    plan_file = output / "plan.json"
    if plan_file.exists() and not resume:
        raise OutputError(
            f"{output}: holds an earlier run; --resume goes on with it, or choose another --output folder."
        )
    tell("Reading the scans")
    scans, shapes, spacings = _read_all(source, on_error)
    if plan_file.exists():
        plan = read_plan(plan_file)
        if plan.scans != tuple(scans):
            raise ModelError(f"{plan_file}: is of other scans than {source}; choose another --output folder.")
    else:
        memory = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else free_memory()
        plan = make_plan(shapes, spacings, scans, preset=preset, memory_bytes=memory, levels=levels, seed=seed)
        write_json(plan_file, asdict(plan))
    tell(describe_plan(plan))

    _train_all(plan, output, place, verbose, tell)
    model, total = output / "model", plan.levels + 2
    tell(f"Step {total} of {total}: drawing the parts of every scan")
    results = segment(
        list(plan.scans),
        output / "parts",
        model=str(model),
        level="all",
        device=device,
        preview=True,
        statistics=True,
        tables=True,
        report=True,
        resume=True,
        progress=progress,
        on_error=on_error,
    )
    from diffdiscover3d.reporting.index_page import write_index

    write_index(
        output / "index.html", sorted((output / "parts").glob("*_report.html")), title="Parts found in your scans"
    )
    return results


def read_plan(path: Path) -> Plan:
    """Read a plan back.

    Raises:
        ModelError: if the file is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Plan(**{k: _as_tuple(v) for k, v in values.items()})
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not a readable plan ({error}); choose another --output folder.") from error


def _as_tuple(value):
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


def describe_plan(plan: Plan) -> str:
    """The plan in a sentence or two."""
    shape, spacing = "×".join(map(str, plan.median_shape)), "×".join(f"{s:g}" for s in plan.median_spacing_mm)
    working = "at full resolution" if plan.working_grid is None else "on " + "×".join(map(str, plan.working_grid))
    return (
        f"{len(plan.scans)} scans, typically {shape} voxels of {spacing} mm; preset {plan.preset}: diffusion model on "
        f"{'×'.join(map(str, plan.diffusion_grid))} voxels, {plan.batch_size} at a time, parts {working}"
    )


def _read_all(source, on_error) -> tuple[list[str], list, list]:
    """Read every scan whole once: a damaged one is found now rather than in the middle of a training."""
    scans, shapes, spacings = [], [], []
    for path in list_volumes(source):
        try:
            volume = read_nifti(path)
        except DiffDiscoverError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        scans.append(str(path.resolve()))
        shapes.append(volume.data.shape)
        spacings.append(volume.spacing_mm)
    if not scans:
        raise InputError(f"{source}: none of its scans can be read.")
    return scans, shapes, spacings


def _shrink(shape: Sequence[int], edge: int, multiple: int = 1) -> tuple[int, int, int]:
    """A grid of the shape's proportions with no more voxels than a cube of this edge, up to rounding to `multiple`."""
    scale = min(1.0, (edge**3 / math.prod(shape)) ** (1 / 3))
    least = max(2, multiple)
    return tuple(max(least, round(n * scale / multiple) * multiple) for n in shape)


def _train_all(plan: Plan, output: Path, place: torch.device, verbose: bool, tell: Callable[[str], None]) -> None:
    """Train what is not trained yet, and put what the trainings are for into `model/`."""
    training, model, total = output / "training", output / "model", plan.levels + 2
    listed = output / "scans.txt"
    listed.write_text("".join(f"{scan}\n" for scan in plan.scans), encoding="utf-8")
    recipe, dataset = make_recipe(plan), str(listed.resolve())
    tell(f"Step 1 of {total}: learning what your scans look like ({plan.diffusion_steps} rounds)")
    teacher = diffusion_training(recipe, dataset, plan.seed, training / "diffusion")
    _train(teacher, "model_index.json", place, verbose)
    parent = None
    for level, steps in enumerate(plan.discovery_steps, start=1):
        tell(f"Step {level + 1} of {total}: learning to tell {LEVEL_PARTS[level]} parts apart ({sum(steps)} rounds)")
        folder = training / f"level{level}"
        for step in discovery_trainings(recipe, level, dataset, plan.seed, str(teacher.folder), parent, folder):
            _train(step, "selection.json", place, verbose)
        parent = folder
    _take_over(teacher.folder, model / "diffusion")
    # with the network, so that it goes where the network goes
    _take_over(parent, model / "discovery", {WORKING_GRID_FILE: {"grid": plan.working_grid}})


def make_recipe(plan: Plan) -> Recipe:
    """The trainings of a plan: the nested recipe with the plan's grids, batch and numbers of steps."""
    shared = {"resume": "latest", "checkpoint_every": 100}
    diffusion = {
        **shared,
        "preset": PRESETS[plan.preset]["network"],
        "max_steps": plan.diffusion_steps,
        "batch_size": plan.batch_size,
        "sample_size": plan.diffusion_grid,
    }
    if plan.working_grid:
        shared["volume_size"] = plan.working_grid
    levels = {
        level: [{**step, **shared, "max_steps": n} for step, n in zip(_RECIPE.levels[level], steps, strict=True)]
        for level, steps in enumerate(plan.discovery_steps, start=1)
    }
    return Recipe(diffusion, levels, nested=True)


def _take_over(trained: Path, target: Path, also: dict[str, dict] | None = None) -> None:
    """Copy a trained model without what its training left beside it."""
    if target.exists():
        return
    with atomic_folder(target) as folder:
        ignored = shutil.ignore_patterns("checkpoints", "options.json", "log.jsonl")
        shutil.copytree(trained, folder, ignore=ignored, dirs_exist_ok=True)
        for name, values in (also or {}).items():
            write_json(folder / name, values)


def _train(training: Training, result: str, place: torch.device, verbose: bool) -> None:
    """Run a training in a process of its own, unless its result is there; it goes on from its last checkpoint."""
    folder = training.folder
    if (folder / result).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "options.json"
    options = {**training.options, "output_dir": folder}
    write_json(file, {k: str(v) if isinstance(v, Path) else v for k, v in options.items()})
    command = [sys.executable, "-m", "diffdiscover3d.train", training.stage, "--config", str(file)]
    environment = dict(os.environ)
    if place.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    elif place.type == "cuda" and place.index is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(place.index)
    done = subprocess.run([*command, *([] if verbose else ["--quiet"])], env=environment, stdout=subprocess.DEVNULL)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        raise ModelError(
            f"{folder}: the training stopped with exit code {done.returncode}, see above; --resume goes on from its "
            "last checkpoint."
        )

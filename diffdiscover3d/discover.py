"""From scans to pictures in one go: plan, train both stages, segment, report. Every step can be resumed."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from diffdiscover3d.data.folder import list_volumes
from diffdiscover3d.data.nifti import read_nifti
from diffdiscover3d.errors import DiffDiscoverError, InputError, ModelError, OutputError
from diffdiscover3d.files import check_folder, write_json
from diffdiscover3d.segmentation import WORKING_GRID_FILE, SegmentedFile, choose_device, segment

LEVEL_PARTS = {1: 2, 2: 4, 3: 8}  # the paper's: level L has these parts, from the features of stage L
_STRIDE = 8  # of the diffusion models: their grid is a multiple of it
_BYTES_PER_VOXEL = 6_000  # of a training step of the small networks, measured 3,000 to 4,500; with room to spare

# voxels of the grids are cubes of these edges at most; `quick` is for a first look within minutes on two CPU cores
PRESETS = {
    "quick": {"network": "small", "grid": 32, "volume": 50, "batch": 2, "diffusion": 300, "discovery": 150},
    "standard": {"network": "small", "grid": 48, "volume": 96, "batch": 4, "diffusion": 2_500, "discovery": 1_200},
    "paper": {"network": "paper", "grid": 64, "volume": 160, "batch": 4, "diffusion": 50_000, "discovery": 2_000},
}


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
        diffusion_steps, discovery_steps: optimiser steps (the latter for each level).
        levels: which are learnt.
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
    discovery_steps: int
    levels: tuple[int, ...]
    seed: int


def make_plan(
    shapes: Sequence[Sequence[int]],
    spacings_mm: Sequence[Sequence[float]],
    scans: Sequence[str],
    *,
    preset: str = "standard",
    memory_bytes: int,
    levels: Sequence[int] = (1, 2, 3),
    seed: int = 0,
) -> Plan:
    """Choose grids, batch and steps for these scans.

    The grids have the proportions of the median scan and no more voxels than the preset's cube; the batch, and then
    the grid, shrink until a training step fits into half the memory.

    Raises:
        ValueError: for an unknown preset or level.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {tuple(PRESETS)}, got {preset!r}.")
    if not levels or not set(levels) <= set(LEVEL_PARTS):
        raise ValueError(f"`levels` must be some of {tuple(LEVEL_PARTS)}, got {tuple(levels)}.")
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
        options["discovery"],
        tuple(sorted(set(levels))),
        seed,
    )


def discover(
    source: str | Path,
    output: str | Path,
    *,
    preset: str = "standard",
    levels: Sequence[int] = (1, 2, 3),
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
        output: folder for everything: `plan.json`, `model/` (which `segment --model` takes), `parts/` (label maps,
            tables and reports) and `index.html`.
        preset: "quick" (a first look), "standard", or "paper" (wants a GPU).
        levels: which of the levels 1, 2, 3 (2, 4, 8 parts).
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
        memory = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available
        plan = make_plan(shapes, spacings, scans, preset=preset, memory_bytes=memory, levels=levels, seed=seed)
        write_json(plan_file, asdict(plan))
    tell(describe_plan(plan))

    total = 2 + len(plan.levels)
    model = output / "model"
    listed = output / "scans.txt"
    listed.write_text("".join(f"{scan}\n" for scan in plan.scans), encoding="utf-8")
    tell(f"Step 1 of {total}: learning what your scans look like ({plan.diffusion_steps} rounds)")
    options = {
        "preset": PRESETS[plan.preset]["network"],
        "dataset": str(listed.resolve()),
        "seed": plan.seed,
        "resume": "latest",
        "checkpoint_every": 100,
    }
    diffusion = {
        **options,
        "output_dir": str(model / "diffusion"),
        "max_steps": plan.diffusion_steps,
        "batch_size": plan.batch_size,
        "sample_size": list(plan.diffusion_grid),
    }
    _train("diffusion", diffusion, "model_index.json", place, verbose)
    for number, level in enumerate(plan.levels, start=2):
        parts = LEVEL_PARTS[level]
        tell(f"Step {number} of {total}: learning to tell {parts} parts apart ({plan.discovery_steps} rounds)")
        discovery = {
            **options,
            "output_dir": str(model / f"discovery-level{level}"),
            "teacher": str(model / "diffusion"),
            "max_steps": plan.discovery_steps,
            "num_parts": parts,
            "stages": [level],
        }
        if plan.working_grid:
            discovery["volume_size"] = list(plan.working_grid)
        _train("discovery", discovery, "selection.json", place, verbose)
    write_json(model / WORKING_GRID_FILE, {"grid": plan.working_grid})
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
        return Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not a readable plan ({error}); choose another --output folder.") from error


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


def _train(stage: str, options: dict, result: str, place: torch.device, verbose: bool) -> None:
    """Run a training in a process of its own, unless its result is there; it goes on from its last checkpoint."""
    folder = Path(options["output_dir"])
    if (folder / result).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "options.json"
    write_json(file, {k: v for k, v in options.items() if v is not None})
    command = [sys.executable, "-m", "diffdiscover3d.train", stage, "--config", str(file)]
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

"""The plan of `discover`: grids, batch size and steps that fit the scans and the machine."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS
from diffdiscover3d.data.working_grid import coarsen_spacing, describe_spacing, resampled_shape, target_spacing
from diffdiscover3d.errors import ModelError
from diffdiscover3d.training.recipes import RECIPES, Recipe

_STRIDE = 8  # the diffusion models' grid must be a multiple of it
_BYTES_PER_VOXEL = 6_000  # of a training step of the small networks: a conservative guess, not measured

# `grid` and `volume`: edges of the largest cubes of voxels. `first`: steps of the first discovery training, which all
# others start from; one that finds an object does so within 100 (benchmarks/results/starts.json). `rounds` scales the
# steps of the others. `quick` takes minutes on two CPU cores. In all recipes each level divides the parts of the one
# before.
PRESETS = {
    "quick": {
        "network": "small",
        "recipe": "small-first-round",
        "grid": 32,
        "volume": 50,
        "batch": 2,
        "diffusion": 300,
        "first": 150,
        "rounds": 0.25,
    },
    "standard": {
        "network": "small",
        "recipe": "small",
        "grid": 48,
        "volume": 96,
        "batch": 4,
        "diffusion": 2_500,
        "first": 300,
        "rounds": 1.0,
    },
    "paper": {
        "network": "paper",
        "recipe": "small",
        "grid": 64,
        "volume": 160,
        "batch": 4,
        "diffusion": 50_000,
        "first": 600,
        "rounds": 2.0,
    },
}
# for a level whose volumes have no inclusions to assign
_FALLBACK = RECIPES["small-consistency"]
_RESUMED = {"resume": "latest", "checkpoint_every": 100}


@dataclass(frozen=True)
class Plan:
    """The trainings for a folder of scans; written to `plan.json`, and read from it when resumed.

    Attributes:
        scans: absolute paths.
        preset: of `PRESETS`.
        median_shape, median_spacing_mm: of the scans in canonical orientation.
        spacing, spacing_unit: target spacing, to which scans are resampled; see [`WorkingGrid`].
        diffusion_grid: internal grid of the diffusion model.
        batch_size: volumes in a step of the diffusion model.
        diffusion_steps: optimiser steps of the diffusion model.
        discovery_steps: for each level, the optimiser steps of its consecutive trainings.
        levels: number of levels; level L has 2^L parts, each nested in one of the level before.
        seed: of everything random.
        recipe: digest of the recipes that give all other options.
        sha256: of the scans, in their order.
        reading: options of [`read_volume`] that are not at their defaults.
    """

    scans: tuple[str, ...]
    preset: str
    median_shape: tuple[int, int, int]
    median_spacing_mm: tuple[float, float, float]
    spacing: tuple[float, float, float]
    spacing_unit: str
    diffusion_grid: tuple[int, int, int]
    batch_size: int
    diffusion_steps: int
    discovery_steps: tuple[tuple[int, ...], ...]
    levels: int
    seed: int
    recipe: str
    sha256: tuple[str, ...] = ()
    reading: dict = field(default_factory=dict)


def make_plan(
    shapes: Sequence[Sequence[int]],
    spacings_mm: Sequence[Sequence[float]],
    scans: Sequence[str],
    *,
    preset: str = "standard",
    memory_bytes: int,
    levels: int = 3,
    seed: int = 0,
    spacing: Sequence[float] | None = None,
    spacing_unit: str = "mm",
) -> Plan:
    """Choose target spacing, grid, batch size and steps for a folder of scans.

    The target spacing is nnU-Net's, see [`target_spacing`] and [`coarsen_spacing`]: the median scan has at most as many
    voxels as the preset's cube. The diffusion model's grid has the proportions of the median scan at that spacing.
    Batch size, grid and spacing are changed until a training step fits into half of the memory.

    Args:
        shapes, spacings_mm, scans: of every scan, in canonical orientation.
        preset: of `PRESETS`.
        memory_bytes: free memory of the device.
        levels, seed: of [`discover`].
        spacing: a target spacing to use instead, in `spacing_unit`.
        spacing_unit: "voxel" if the voxel size of a scan is unknown, so that lengths are counted in voxels.

    Raises:
        ValueError: for an unknown preset, or a number of levels out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {tuple(PRESETS)}, got {preset!r}.")
    if not 1 <= levels <= len(LEVEL_PARTS):
        raise ValueError(f"`levels` must be 1 to {len(LEVEL_PARTS)}, got {levels}.")
    options = PRESETS[preset]
    median = tuple(int(n) for n in np.median(np.asarray(shapes), axis=0))
    edges = np.asarray(spacings_mm if spacing_unit == "mm" else np.ones((len(shapes), 3)), float)
    if spacing is None:
        target = target_spacing(edges, shapes)
        most = max(16**3, memory_bytes / 2 / _BYTES_PER_VOXEL)
        target = coarsen_spacing(target, edges, shapes, min(options["volume"] ** 3, most), most)
    else:
        target = tuple(map(float, spacing))
    median_at_target = tuple(
        int(n) for n in np.median([resampled_shape(n, s, target) for n, s in zip(shapes, edges, strict=True)], axis=0)
    )
    grid = _shrink(median_at_target, options["grid"], multiple=_STRIDE)
    # the paper's network has 4 times the channels, so about 4 times the activations
    bytes_per_voxel = _BYTES_PER_VOXEL * (4 if options["network"] == "paper" else 1)
    batch = min(options["batch"], max(1, len(shapes)))
    while batch > 1 and batch * math.prod(grid) * bytes_per_voxel > memory_bytes / 2:
        batch //= 2
    edge = options["grid"]
    while max(grid) > 2 * _STRIDE and math.prod(grid) * bytes_per_voxel > memory_bytes / 2:
        edge -= _STRIDE
        grid = _shrink(median_at_target, edge, multiple=_STRIDE)
    steps = [
        [max(1, round(step["max_steps"] * options["rounds"])) for step in RECIPES[options["recipe"]].levels[level]]
        for level in range(1, levels + 1)
    ]
    steps[0][0] = options["first"]
    return Plan(
        tuple(scans),
        preset,
        median,
        tuple(float(f"{s:.4g}") for s in np.median(np.asarray(spacings_mm), axis=0)),
        target,
        spacing_unit,
        grid,
        batch,
        options["diffusion"],
        tuple(map(tuple, steps)),
        levels,
        seed,
        _digest(preset),
    )


def _digest(preset: str) -> str:
    """Identifies all options of a preset's trainings that are not in the plan."""
    both = RECIPES[PRESETS[preset]["recipe"]].digest() + _FALLBACK.digest()
    return hashlib.sha256(both.encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ModelError: if the file is damaged, or was written by a version with another recipe.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digest = _digest(values["preset"])
        earlier = values.get("recipe") != digest or "working_grid" in values  # a grid of fixed shape, no spacing
        plan = None if earlier else Plan(**{k: _as_tuple(v) for k, v in values.items()})
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{path}: not a readable plan ({error}); choose another --output folder.") from error
    if plan is None:
        raise ModelError(
            f"{path}: its trainings were begun by another version of diffdiscover3d, with other options; finish them "
            "with that version, or choose another --output folder."
        )
    return plan


def _as_tuple(value):
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


def describe_plan(plan: Plan) -> str:
    """The plan in a sentence or two."""
    shape, spacing = "×".join(map(str, plan.median_shape)), "of unknown size"
    if plan.spacing_unit == "mm":
        spacing = f"of {describe_spacing(plan.median_spacing_mm)}"
    return (
        f"{len(plan.scans)} scans, typically {shape} voxels {spacing}; preset {plan.preset}: "
        f"diffusion model on {'×'.join(map(str, plan.diffusion_grid))} voxels, {plan.batch_size} at a time, "
        f"parts on voxels of {describe_spacing(plan.spacing, plan.spacing_unit)}"
    )


def _shrink(shape: Sequence[int], edge: int, multiple: int = 1) -> tuple[int, int, int]:
    """A grid of the shape's proportions with no more voxels than a cube of this edge, up to rounding to `multiple`."""
    scale = min(1.0, (edge**3 / math.prod(shape)) ** (1 / 3))
    least = max(2, multiple)
    return tuple(max(least, round(n * scale / multiple) * multiple) for n in shape)


def make_recipe(plan: Plan) -> Recipe:
    """The preset's recipe with the grids, batch size and numbers of steps of a plan.

    Inclusions are taken to be compact or alike by their number.
    """
    recipe = RECIPES[PRESETS[plan.preset]["recipe"]]
    diffusion = {
        **_RESUMED,
        **plan.reading,
        "preset": PRESETS[plan.preset]["network"],
        "max_steps": plan.diffusion_steps,
        "batch_size": plan.batch_size,
        "sample_size": plan.diffusion_grid,
        "spacing": plan.spacing,
        "spacing_unit": plan.spacing_unit,
    }
    shared = _shared_options(plan)
    levels = {
        level: [
            {**step, **shared, "max_steps": n, **({"inclusions": "auto"} if level > 1 else {})}
            for step, n in zip(recipe.levels[level], steps, strict=True)
        ]
        for level, steps in enumerate(plan.discovery_steps, start=1)
    }
    return Recipe(diffusion, levels, nested=True, starts=recipe.starts)


def make_fallback(plan: Plan) -> Recipe:
    """The recipe for a level where no volume has parts to assign: the consistencies alone.

    At level 1 it goes on from the better one of the starts, which are finished.
    """
    options, shared = PRESETS[plan.preset], _shared_options(plan)
    levels = {
        level: [{**step, **shared, "max_steps": max(1, round(step["max_steps"] * options["rounds"]))} for step in steps]
        for level, steps in _FALLBACK.levels.items()
    }
    return Recipe({}, levels, nested=True, starts=_FALLBACK.starts)


def _shared_options(plan: Plan) -> dict:
    """Options of all discovery trainings."""
    return {**_RESUMED, **plan.reading, "spacing": plan.spacing, "spacing_unit": plan.spacing_unit}

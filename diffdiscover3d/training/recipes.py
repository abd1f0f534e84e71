"""Recipes: the trainings that lead from raw volumes to the networks of every level.

A recipe is data: options of `python -m diffdiscover3d.train`, and nothing that could not be typed there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdiscover3d.data.synthetic import LEVEL_PARTS


@dataclass(frozen=True)
class Recipe:
    """How the models are trained.

    Attributes:
        diffusion: options of the diffusion training.
        levels: for each level the options of one or more discovery trainings, each of which starts from the network of
            the one before it.
        nested: whether levels 2 and 3 divide the parts of the level before them.
    """

    diffusion: Mapping
    levels: Mapping[int, Sequence[Mapping]]
    nested: bool

    def changed(self, **options) -> "Recipe":
        """The same with other options in every discovery training."""
        levels = {level: [{**step, **options} for step in steps] for level, steps in self.levels.items()}
        return dataclasses.replace(self, levels=levels)


@dataclass(frozen=True)
class Training:
    """One training of a recipe: its stage ("diffusion" or "discovery"), its options and its output folder."""

    stage: str
    options: dict
    folder: Path

    def arguments(self) -> list[str]:
        """The command line after `python -m diffdiscover3d.train`."""
        words = [self.stage]
        for name, value in {**self.options, "output_dir": self.folder}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
        return words


def diffusion_training(recipe: Recipe, dataset: str, seed: int, folder: Path) -> Training:
    """The training of the teacher."""
    return Training("diffusion", {**recipe.diffusion, "dataset": dataset, "seed": seed}, folder)


def discovery_trainings(
    recipe: Recipe, level: int, dataset: str, seed: int, teacher: str, parent: Path | None, folder: Path
) -> list[Training]:
    """The trainings of a level, in their order; the last one's folder is `folder`.

    Args:
        parent: folder of the level before, for a nested recipe.
    """
    trainings: list[Training] = []
    steps = recipe.levels[level]
    for number, step in enumerate(steps, start=1):
        options = {**step, "dataset": dataset, "seed": seed, "teacher": teacher, "num_parts": LEVEL_PARTS[level]}
        if trainings:
            options["init_from"] = trainings[-1].folder
        elif recipe.nested and parent is not None:
            options["parent"] = parent
        is_last = number == len(steps)
        trainings.append(
            Training("discovery", options, folder if is_last else folder.with_name(f"{folder.name}-step{number}"))
        )
    return trainings


def _as_written(preset: str, **options) -> Recipe:
    """Level s from the features of stage s, as section 3 of the paper has it."""
    levels = {level: [{"preset": preset, "stages": (level,), **options}] for level in LEVEL_PARTS}
    return Recipe({"preset": preset}, levels, nested=False)


# the teacher is asked once for each volume, several times over: faster than a fresh draw at every step, and less noisy.
# Dropout would blur the boundaries. The last epoch is kept: its rate is near zero, and confidence is high long before.
_SMALL = {"preset": "small", "teacher_noise": "fixed", "num_noise": 2, "dropout": 0.0, "selection": "last"}
_WHOLE = {**_SMALL, "stages": (1, 2)}
_INSIDE = {
    **_SMALL,
    "denoised_timesteps": (25, 60, 100),
    "lambda_feature": 0.3,
    "lambda_visual": 0.3,
    "learning_rate": 2e-3,
    "max_steps": 400,
}
RECIPES: dict[str, Recipe] = {
    "paper": _as_written("paper"),
    # the paper's equations at the small size
    "small-as-written": _as_written(
        "small", relative_consistency=False, lambda_denoised=0.0, invert_probability=0.0, learning_rate=3e-4
    ),
    # what the exploration in benchmarks/ led to, on two CPU cores
    "small": Recipe(
        {"preset": "small"},
        {
            1: [
                # features find the cell; then all terms, at a rate that gets the confident network to move its boundary
                {**_WHOLE, "lambda_visual": 0.0, "lambda_denoised": 0.0, "max_steps": 400},
                {
                    **_WHOLE,
                    "lambda_invariance": 2.0,
                    "lambda_denoised": 0.5,
                    "denoised_timesteps": (25, 60),
                    "learning_rate": 2e-3,
                    "max_steps": 1_000,
                },
            ],
            2: [{**_INSIDE, "stages": (2,), "lambda_invariance": 0.3}],
            3: [{**_INSIDE, "stages": (3,), "lambda_invariance": 0.03}],
        },
        nested=True,
    ),
}

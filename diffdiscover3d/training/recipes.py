"""Recipes: the trainings that lead from raw volumes to the networks of every level.

A recipe is data: options of `python -m diffdiscover3d.train`, and nothing that could not be typed there.
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdiscover3d.data.datasets.synthetic import LEVEL_PARTS
from diffdiscover3d.errors import ModelError
from diffdiscover3d.training.config import DiscoveryConfig, make_config

_NEXT_START = 1_000  # added to the seed for each further start: no seed that a user counts up to


@dataclass(frozen=True)
class Recipe:
    """How the models are trained.

    Attributes:
        diffusion: options of the diffusion training.
        levels: for each level the options of one or more discovery trainings, each of which starts from the network of
            the one before it.
        nested: whether levels 2 and 3 divide the parts of the level before them.
        starts: how often the first of several trainings of level 1 is begun, each time from other random weights. The
            network with the lowest loss goes on: a start can fail, and the loss, which knows no labels, tells.
    """

    diffusion: Mapping
    levels: Mapping[int, Sequence[Mapping]]
    nested: bool
    starts: int = 1

    def changed(self, **options) -> "Recipe":
        """The same with other options in every discovery training.

        One that is left with the invariance alone, which a single part fulfils, is left out.

        Raises:
            ValueError: if nothing is left of a level.
        """
        levels = {
            level: [changed for step in steps if _has_consistency(changed := {**step, **options})]
            for level, steps in self.levels.items()
        }
        for level, steps in levels.items():
            if not steps:
                raise ValueError(f"level {level} must keep a consistency term, got {options} for all its trainings.")
        return dataclasses.replace(self, levels=levels)

    def starts_of(self, level: int) -> int:
        """How often the first training of a level is begun."""
        return self.starts if level == 1 < len(self.levels[1]) else 1

    def digest(self) -> str:
        """A sha256 over everything the recipe says: results of two recipes must not be taken for one."""
        words = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()


def _has_consistency(step: Mapping) -> bool:
    config = make_config(DiscoveryConfig, **step)
    return max(config.lambda_feature, config.lambda_visual, config.lambda_denoised) > 0


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


def train_level(
    recipe: Recipe,
    level: int,
    dataset: str,
    seed: int,
    teacher: str,
    parent: Path | None,
    folder: Path,
    run: Callable[[Training], None],
) -> list[Training]:
    """Run the trainings of a level in their order, each from the network of the one before.

    Args:
        parent: folder of the level before, for a nested recipe.
        folder: of the last training; those before it lie beside it.
        run: runs a training, or knows that it is done.

    Returns:
        The trainings that were run, starts that were given up included.
    """
    steps, done, before = recipe.levels[level], [], None
    for number, step in enumerate(steps, start=1):
        shared = {**step, "dataset": dataset, "teacher": teacher, "num_parts": LEVEL_PARTS[level]}
        if before is not None:
            shared["init_from"] = before
        elif recipe.nested and parent is not None:
            shared["parent"] = parent
        place = folder if number == len(steps) else folder.with_name(f"{folder.name}-step{number}")
        starts = recipe.starts_of(level) if number == 1 else 1
        trainings = [
            Training(
                "discovery",
                {**shared, "seed": seed + _NEXT_START * start},
                place.with_name(f"{place.name}-start{start + 1}") if start else place,
            )
            for start in range(starts)
        ]
        for training in trainings:
            run(training)
        before = min((t.folder for t in trainings), key=final_loss) if starts > 1 else place
        done += trainings
    return done


def final_loss(folder: Path) -> float:
    """Mean loss in the last quarter of a training's steps, as its log has them; infinite if one was not finite.

    Raises:
        ModelError: if the log cannot be read.
    """
    log = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        last = [float(line["loss"]) for line in lines if line["step"] > 0.75 * lines[-1]["step"]]
        mean = statistics.fmean(last)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(
            f"{log}: must hold the losses of a finished training ({error}); remove {folder} to train it again."
        ) from error
    return mean if math.isfinite(mean) else math.inf


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
                {
                    **_WHOLE,
                    "lambda_visual": 0.0,
                    "lambda_denoised": 0.0,
                    "invert_probability": 1.0,  # where only some steps invert, seeds are lost to bright and dark
                    "max_steps": 300,
                    "log_every": 10,
                },
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
        starts=2,
    ),
}

"""Recipes: sequences of trainings from raw volumes to the networks of all levels.

A recipe consists only of options of `python -m diffdiscover3d.train`.
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
from diffdiscover3d.utils.files import check_regular

_NEXT_START = 1_000  # seed offset between starts, larger than the range of typical user seeds


@dataclass(frozen=True)
class Recipe:
    """Training options of the diffusion model and of the discovery networks of all levels.

    Attributes:
        diffusion: options of diffusion pretraining.
        levels: for each level, the options of one or more successive discovery trainings. Each is initialised from the
            network of the previous one.
        nested: whether levels 2 and 3 subdivide the parts of the previous level.
        starts: number of random initialisations of the first of several trainings of level 1. The network with the
            lowest loss is kept: some starts fail, and the unsupervised loss detects failed starts. All starts use the
            same volumes and random draws in the same steps, so that their losses are comparable.
    """

    diffusion: Mapping
    levels: Mapping[int, Sequence[Mapping]]
    nested: bool
    starts: int = 1

    def changed(self, **options) -> "Recipe":
        """Return a copy with different options in every discovery training.

        Trainings without a consistency term are dropped, because a single part minimises the invariance.

        Raises:
            ValueError: if a level has no trainings left, or level 1 none that begins without a network.
        """
        levels = {
            level: [changed for step in steps if _has_consistency(changed := {**step, **options})]
            for level, steps in self.levels.items()
        }
        for level, steps in levels.items():
            if not steps or (level == 1 and _needs_start(steps[0])):
                raise ValueError(f"level {level} must keep a consistency term, got {options} for all its trainings.")
        return dataclasses.replace(self, levels=levels)

    def starts_of(self, level: int) -> int:
        """The number of random initialisations of the first training of a level."""
        return self.starts if level == 1 < len(self.levels[1]) else 1

    def digest(self) -> str:
        """The sha256 of all options, by which results of different recipes are told apart."""
        words = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()


def _has_consistency(step: Mapping) -> bool:
    config = make_config(DiscoveryConfig, **step)
    return (
        config.objective == "assignment" or max(config.lambda_feature, config.lambda_visual, config.lambda_denoised) > 0
    )


def _needs_start(step: Mapping) -> bool:
    """Whether a training of the first level can only continue from another."""
    config = make_config(DiscoveryConfig, **step)
    return config.objective == "assignment" and config.assign_from == "auto"


@dataclass(frozen=True)
class Training:
    """One training of a recipe: its phase ("diffusion" or "discovery"), options and output folder."""

    phase: str
    options: dict
    folder: Path

    def arguments(self) -> list[str]:
        """The command line after `python -m diffdiscover3d.train`."""
        words = [self.phase]
        for name, value in {**self.options, "output_dir": self.folder}.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, list | tuple) else [value])]
        return words


def diffusion_training(recipe: Recipe, dataset: str, seed: int, folder: Path) -> Training:
    """The diffusion pretraining of a recipe."""
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
    """Run the trainings of a level in order, each initialised from the network of the previous one.

    Args:
        recipe: the recipe.
        level: level of the hierarchy, from 1.
        dataset: dataset name or path.
        seed: random seed.
        teacher: folder, Hub id or name of the diffusion model.
        parent: folder of the network of the previous level, for a nested recipe.
        folder: output folder of the last training; earlier trainings are written to sibling folders.
        run: runs a training unless it has already finished.

    Returns:
        All trainings, including discarded starts.
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
                {**shared, "seed": seed, **({"init_seed": seed + _NEXT_START * start} if start else {})},
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
    """Mean logged loss over the last quarter of a training's steps; infinite if a loss is not finite.

    Raises:
        ModelError: if the log cannot be read.
    """
    log = folder / "log.jsonl"
    try:
        check_regular(log)
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        last = [float(line["loss"]) for line in lines if line["step"] > 0.75 * lines[-1]["step"]]
        mean = statistics.fmean(last)
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{log}: must contain the losses of a finished training ({error}); remove {folder} to train it again."
        ) from error
    return mean if math.isfinite(mean) else math.inf


def _as_written(preset: str, **options) -> Recipe:
    """Level s from the features of decoder stage s, as in section 3 of the paper."""
    levels = {level: [{"preset": preset, "stages": (level,), **options}] for level in LEVEL_PARTS}
    return Recipe({"preset": preset}, levels, nested=False)


# Teacher outputs are computed once per volume and averaged over noise samples: faster and less noisy than new noise at
# every step. Dropout blurs boundaries. The last epoch is saved, because confidence saturates early.
_SMALL = {"preset": "small", "teacher_noise": "fixed", "num_noise": 2, "dropout": 0.0, "selection": "last"}
_FIRST_LEVEL = {**_SMALL, "stages": (1, 2)}
_NESTED = {
    **_SMALL,
    "denoised_timesteps": (25, 60, 100),
    "lambda_feature": 0.3,
    "lambda_visual": 0.3,
    "learning_rate": 2e-3,
    "max_steps": 400,
}
# features alone segment the cell; then all terms refine its boundary at a higher learning rate
_FIRST = [
    {
        **_FIRST_LEVEL,
        "lambda_visual": 0.0,
        "lambda_denoised": 0.0,
        "invert_probability": 1.0,  # with lower values, some seeds collapse to a bright/dark split
        "max_steps": 300,
        "log_every": 10,
    },
    {
        **_FIRST_LEVEL,
        "lambda_invariance": 2.0,
        "lambda_denoised": 0.5,
        "denoised_timesteps": (25, 60),
        "learning_rate": 2e-3,
        "max_steps": 1_000,
    },
]
# parts are assigned to the training volumes, and the network is trained on them with other mean intensities
_ASSIGNED = {
    **_SMALL,
    "objective": "assignment",
    "denoised_timesteps": (25, 60, 100),
    "batch_size": 2,
    "learning_rate": 2e-3,
    "max_steps": 1_200,
}
_CLUSTERED = {**_ASSIGNED, "reliable_share": 0.5}  # assignments from clusters in space
_OWN = {**_ASSIGNED, "reliable_share": 0.75}  # assignments from the network of the training before
_FREE = {"sibling_order": "free"}
_FINEST = {**_CLUSTERED, **_FREE, "max_steps": 1_000}  # a second round adds .01
_LABELLED = {**_ASSIGNED, "assign_from": "labels", "reliable_share": 1.0, "max_steps": 3_000}
RECIPES: dict[str, Recipe] = {
    "paper": _as_written("paper"),
    # the equations of the paper at the small size
    "small-as-written": _as_written(
        "small", relative_consistency=False, lambda_denoised=0.0, invert_probability=0.0, learning_rate=3e-4
    ),
    # nested, by the consistencies alone
    "small-consistency": Recipe(
        {"preset": "small"},
        {
            1: _FIRST,
            2: [{**_NESTED, "stages": (2,), "lambda_invariance": 0.3}],
            3: [{**_NESTED, "stages": (3,), "lambda_invariance": 0.03}],
        },
        nested=True,
        starts=2,
    ),
    # result of the explorations in benchmarks/, on two CPU cores
    "small": Recipe(
        {"preset": "small"},
        {
            1: [
                *_FIRST,
                {**_OWN, "reliable_share": 0.5, "max_steps": 600},
                {**_OWN, "max_steps": 600},
                {**_OWN, "max_steps": 800},
            ],
            2: [_CLUSTERED, _OWN],
            3: [_FINEST],
        },
        nested=True,
        starts=2,
    ),
    "small-first-round": Recipe(
        {"preset": "small"},
        {
            1: [*_FIRST, {**_OWN, "reliable_share": 0.5, "max_steps": 600}, {**_OWN, "max_steps": 600}],
            2: [_CLUSTERED],
            3: [_FINEST],
        },
        nested=True,
        starts=2,
    ),
    # a ceiling: the same network on the true labels of synthetic cells
    "small-supervised": Recipe(
        {"preset": "small"}, {1: [_LABELLED], 2: [_LABELLED], 3: [_LABELLED | _FREE]}, nested=True
    ),
}

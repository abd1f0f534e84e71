"""Clusters in space without training: the first assignment step, one choice varied at a time.

    python -m benchmarks.explorations.assignments              (about five minutes on one core)

Divides the validation volumes of both variants with the embedded diffusion model, inside the true parts of the level
before, so that nothing but the division itself is scored. The base is that of the recipe; each row changes one option.
The divisions of the base are then ranked by the contrast of their inclusions, and by contrast and compactness
(`separation`): the mean Dice of the better half shows which rule finds the volumes that are worth training on. Writes
`results/assignments.json`.
"""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.synthetic import GENERATOR_VERSION, LEVEL_PARTS, VARIANTS
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.evaluation.metrics import dataset_dice, dice_matrix, matched_dice
from diffdiscover3d.hub.registry import load_teacher
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.training.reliability import contrasts, separation
from diffdiscover3d.training.spatial_split import divide_structure
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

SPLIT = "validation"
# level: the true parts of the level before that are divided, and the first part of each in the level
DIVIDED = {2: {1: 1}, 3: {2: 2, 3: 5}}
TIMESTEPS, DRAWS = (25, 60, 100), 2


def trials() -> Iterator[tuple[str, dict]]:
    """What a row changes, and the options of [`divide_structure`] for it."""
    yield "base", {}
    for strength in (0.0, 0.3, 0.9):
        yield f"Potts strength {strength}", {"strength": strength}
    yield "inclusions that are alike", {"alike": True}
    yield "clusters of the raw volume", {"clean": "raw"}


def clean_prediction(teacher: DiffusionFeaturePipeline, volume: torch.Tensor) -> np.ndarray:
    """(H, W, D) mean over timesteps and draws."""
    generator = torch.Generator().manual_seed(0)
    found = [teacher(volume[None], t, (), generator, DRAWS, denoised=True).denoised[0, 0] for t in TIMESTEPS]
    return torch.stack(found).mean(dim=0).numpy()


def divide(raw: np.ndarray, clean: np.ndarray, true: np.ndarray, level: int, options: dict) -> np.ndarray:
    """The parts of a level inside the true parts of the level before; parts that are not divided are the true ones."""
    options = dict(options)
    clean = raw if options.pop("clean", None) == "raw" else clean
    found = np.zeros(raw.shape, dtype=np.int64)
    before, divided = true[level - 2], DIVIDED[level]
    for part in range(LEVEL_PARTS[level - 1]):
        within = before == part
        if part in divided:
            found[within] = divided[part] + divide_structure(raw, clean, within, 3, **options)[within]
        else:
            found[within] = part
    return found


def rank(raw: np.ndarray, found: np.ndarray, true: np.ndarray, level: int) -> Iterator[tuple[int, dict[str, float]]]:
    """For each divided part: the Dice of its division and the values by which it can be ranked."""
    for part, first in DIVIDED[level].items():
        family = (first, first + 1, first + 2)
        within = true[level - 2] == part
        own = np.where(within, found - first + 1, 0)
        parts = np.unique(true[level - 1][within])
        reference = np.where(within, 1 + np.searchsorted(parts, true[level - 1]), 0)
        scores = dice_matrix(own, reference, 4, 1 + len(parts))[1:, 1:]
        yield (
            part,
            {
                "Dice": matched_dice(scores),
                "contrast": float(contrasts(raw, found, family).min()),
                "separation": separation(raw, found, family),
            },
        )


def best_halves(ranked: dict[tuple, list[dict[str, float]]]) -> list[dict]:
    """The mean Dice of the better half of the divisions by each rule, and by the Dice itself: the best possible."""
    rows = []
    for (level, part), found in ranked.items():
        row = {"level": level, "part": part, "all": float(np.mean([one["Dice"] for one in found]))}
        for rule in ("contrast", "separation", "Dice"):
            best = sorted(found, key=lambda one: -one[rule])[: len(found) // 2]
            row[f"better half by {rule}"] = float(np.mean([one["Dice"] for one in best]))
        rows.append(row)
    return rows


def measure(variant: str) -> tuple[list[dict], list[dict]]:
    """One row for each level and trial, and one for each divided part with the rules to rank its divisions."""
    teacher, volumes = load_teacher("synthetic-regular"), load_volumes(f"synthetic-{variant}", SPLIT)
    scores: dict[tuple, list[np.ndarray]] = {}
    ranked: dict[tuple, list[dict[str, float]]] = {}
    for i in range(len(volumes)):
        volume, true = volumes[i]["volume"], volumes[i]["labels"].numpy()
        raw, clean = volume[0].numpy(), clean_prediction(teacher, volume)
        for name, options in trials():
            for level in DIVIDED:
                found, parts = divide(raw, clean, true, level, options), LEVEL_PARTS[level]
                scores.setdefault((name, level), []).append(dice_matrix(found, true[level - 1], parts, parts))
                if name == "base":
                    for part, values in rank(raw, found, true, level):
                        ranked.setdefault((level, part), []).append(values)
    rows = [
        {"variant": variant, "level": level, "trial": name, **dataset_dice(np.stack(found))}
        for (name, level), found in scores.items()
    ]
    return rows, [{"variant": variant, **row} for row in best_halves(ranked)]


def main() -> None:
    rows, ranking = [], []
    for variant in VARIANTS:
        found, ranked = measure(variant)
        rows, ranking = rows + found, ranking + ranked
        print(*(f"{r['variant']} level {r['level']} {r['trial']}: {r['dice']:.3f}" for r in found), *ranked, sep="\n")
    result = {
        "command": "python -m benchmarks.explorations.assignments",
        "content": "clusters in space inside the true parts of the level before, without training",
        "split": SPLIT,
        "generator_version": GENERATOR_VERSION,
        "environment": describe_environment(),
        "rows": rows,
        "ranking": ranking,
    }
    write_json(RESULTS / "assignments.json", result)


if __name__ == "__main__":
    main()

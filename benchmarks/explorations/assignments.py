"""Clusters in space without training: the first assignment step, one choice varied at a time.

    python -m benchmarks.explorations.assignments              (about five minutes on one core)

Divides the validation volumes of both variants with the embedded diffusion model, inside the true parts of the level
before, so that nothing but the division itself is scored. The base is that of the recipe; each row changes one option.
Writes `results/assignments.json`.
"""

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.synthetic import GENERATOR_VERSION, LEVEL_PARTS, VARIANTS
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.evaluation.metrics import dataset_dice, dice_matrix
from diffdiscover3d.hub.registry import load_teacher
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
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


def measure(variant: str) -> list[dict]:
    """One row for each level and trial."""
    teacher, volumes = load_teacher("synthetic-regular"), load_volumes(f"synthetic-{variant}", SPLIT)
    scores: dict[tuple, list[np.ndarray]] = {}
    for i in range(len(volumes)):
        volume, true = volumes[i]["volume"], volumes[i]["labels"].numpy()
        raw, clean = volume[0].numpy(), clean_prediction(teacher, volume)
        for name, options in trials():
            for level in DIVIDED:
                found, parts = divide(raw, clean, true, level, options), LEVEL_PARTS[level]
                scores.setdefault((name, level), []).append(dice_matrix(found, true[level - 1], parts, parts))
    return [
        {"variant": variant, "level": level, "trial": name, **dataset_dice(np.stack(found))}
        for (name, level), found in scores.items()
    ]


def main() -> None:
    rows = []
    for variant in VARIANTS:
        rows += measure(variant)
        print(*(f"{r['variant']} level {r['level']} {r['trial']}: {r['dice']:.3f}" for r in rows[-12:]), sep="\n")
    result = {
        "command": "python -m benchmarks.explorations.assignments",
        "content": "clusters in space inside the true parts of the level before, without training",
        "split": SPLIT,
        "generator_version": GENERATOR_VERSION,
        "environment": describe_environment(),
        "rows": rows,
    }
    write_json(RESULTS / "assignments.json", result)


if __name__ == "__main__":
    main()

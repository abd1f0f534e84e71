"""Several structures of one kind: cells with three to five vesicles and two or three mitochondria.

    python -m benchmarks.explorations.many FOLDER      (about ten minutes on two cores)

Level 2 of such a cell has four parts: background, cell, vesicles, mitochondria. Compact parts are wrong for it. The
command writes 24 cells to FOLDER, divides the true cells with compact inclusions, with inclusions that are alike and
with the rule of `--inclusions auto`, and then trains level 2 on 16 of the cells inside the level 1 network that is
embedded, with each of the three and two orders of the parts. Scores are of the other 8 cells. No labels are used but
for the scores and, where nothing is trained, the true cell. Writes `results/many.json`.
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.explorations.assignments import clean_prediction
from diffdiscover3d.data.datasets.synthetic import NOISE_VARIANCE, SHAPE, pink_noise
from diffdiscover3d.data.transforms import min_max_normalize
from diffdiscover3d.evaluation.metrics import dataset_dice, dice_matrix
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.train import main as train
from diffdiscover3d.training.spatial_split import count_pieces, divide_structure
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

CELLS, TRAINED = 24, 16
# of the trainings: inclusions, and the order of their parts
TRAININGS = (("compact", "size"), ("alike", "size"), ("alike", "free"), ("auto", "auto"))
STEPS = 300


def make_cell(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A volume, (50, 50, 50) float32, and its labels: 0 background, 1 cell, 2 vesicles, 3 mitochondria."""
    rng = np.random.default_rng([7, index])
    points = np.indices(SHAPE) - (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    labels = (np.linalg.norm(points, axis=0) <= rng.normal(22, 0.5)).astype(np.uint8)
    kinds = [2] * int(rng.integers(3, 6)) + [3] * int(rng.integers(2, 4))
    placed: list[tuple[np.ndarray, float]] = []
    for kind in kinds:
        radius = float(rng.normal(3.8, 0.3))
        around = radius if kind == 2 else np.sqrt(3) * 0.9 * radius  # radius of the ball around a cube
        while True:
            centre = rng.uniform(-20, 20, 3)
            apart = all(np.linalg.norm(centre - c) > around + r + 1 for c, r in placed)
            if np.linalg.norm(centre) + around < 21 and apart:
                break
        placed.append((centre, around))
        offset = points - centre.reshape(3, 1, 1, 1)
        distance = np.linalg.norm(offset, axis=0) if kind == 2 else np.abs(offset).max(axis=0) / 0.9
        labels[distance <= radius] = kind
    body = rng.normal(0, 1)
    sign = rng.choice([-1.0, 1.0])
    colours = np.array([body + rng.choice([-1, 1]) * rng.uniform(1.5, 3), body, body, body])
    colours[2:] += np.array([sign, -sign]) * rng.uniform(1.0, 2.0, 2)
    return (colours[labels] + pink_noise(rng, SHAPE, NOISE_VARIANCE)).astype(np.float32), labels


def without_training(cells: list) -> list[dict]:
    """Divide the true cells; the rule of `auto` is that of the assignment step."""
    teacher = load_teacher("synthetic-regular")
    matrices: dict[str, list] = {"compact": [], "alike": []}
    pieces = []
    for volume, labels in cells:
        x = min_max_normalize(torch.from_numpy(volume)[None])
        raw, clean = x[0].numpy(), clean_prediction(teacher, x)
        for name, found in matrices.items():
            divided = divide_structure(raw, clean, labels > 0, 3, alike=name == "alike")
            parts = np.where(labels > 0, 1 + divided, 0)
            found.append(dice_matrix(parts, labels, 4, 4))
            if name == "compact":
                pieces.append(count_pieces(parts, [(1, 2, 3)]))
    scores = {name: dataset_dice(np.stack(found[TRAINED:])) for name, found in matrices.items()}
    chosen = "alike" if np.median(pieces[:TRAINED]) > 2 else "compact"
    rows = [{"trained": False, "inclusions": name, **score} for name, score in scores.items()]
    return [*rows, {"trained": False, "inclusions": "auto", "chosen": chosen, **scores[chosen]}]


def with_training(folder: Path, cells: list, inclusions: str, order: str) -> dict:
    """Train level 2 on the first cells and score the others."""
    output = folder / f"level2-{inclusions}-{order}"
    options = [
        *("--preset", "small", "--teacher-noise", "fixed", "--num-noise", "2", "--dropout", "0", "--selection", "last"),
        *("--objective", "assignment", "--denoised-timesteps", "25", "60", "100", "--batch-size", "2"),
        *("--learning-rate", "2e-3", "--reliable-share", "0.75", "--num-parts", "4", "--max-steps", str(STEPS)),
        *("--teacher", "synthetic-regular", "--parent", str(folder / "level1"), "--inclusions", inclusions),
        *("--sibling-order", order),
        *("--dataset", str(folder / "train"), "--preview-every", "0", "--output-dir", str(output)),
    ]
    if not (output / "selection.json").exists() and (code := train(["discovery", *options])):
        raise SystemExit(code)
    network, found = load_discovery(str(output)), []
    for volume, labels in cells[TRAINED:]:
        x = min_max_normalize(torch.from_numpy(volume)[None])
        found.append(dice_matrix(network.segment(x[None]).labels[0].numpy(), labels, 4, 4))
    return {"trained": True, "inclusions": inclusions, "order": order, "steps": STEPS, **dataset_dice(np.stack(found))}


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    cells = [make_cell(i) for i in range(CELLS)]
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for i, (volume, _) in enumerate(cells[:TRAINED]):
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "train" / f"cell{i:02d}.nii.gz")
    load_discovery("synthetic-regular").levels[0].save_pretrained(folder / "level1")
    rows = without_training(cells) + [with_training(folder, cells, *how) for how in TRAININGS]
    for row in rows:
        name = f"{row['inclusions']} {row.get('order', '')}"
        print(f"trained {row['trained']}, {name}: {row['dice']:.3f} ({row['dice_one_matching']:.3f})")
    result = {
        "command": "python -m benchmarks.explorations.many FOLDER",
        "content": "level 2 of cells with several vesicles and mitochondria; 8 cells that were not trained on",
        "environment": describe_environment(),
        "rows": rows,
    }
    write_json(RESULTS / "many.json", result)


if __name__ == "__main__":
    main()

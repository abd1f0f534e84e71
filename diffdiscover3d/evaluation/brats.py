"""Evaluation on BraTS as in Table 3 of the paper: Dice and HD95 of the whole tumour, raw and post-processed."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from diffdiscover3d.baselines.features_kmeans import FeaturesKMeans
from diffdiscover3d.baselines.kmeans import IntensityKMeans
from diffdiscover3d.data.datasets.brats import BraTSOptions
from diffdiscover3d.data.datasets.brats_volumes import BraTSVolumes
from diffdiscover3d.errors import InputError
from diffdiscover3d.evaluation.metrics import binary_dice, dice_matrix, hausdorff_95, match_parts
from diffdiscover3d.evaluation.postprocessing import clean_mask
from diffdiscover3d.hub.registry import load_discovery, load_teacher
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.utils.files import read_model_json
from diffdiscover3d.utils.provenance import describe_environment

NUM_PARTS = 3  # background, brain, tumour
WHOLE_TUMOUR = 2  # index of the whole tumour in the reference parts
Predict = Callable[[torch.Tensor], np.ndarray]


def evaluate_brats(
    root: str | Path,
    models: Mapping[str, str],
    split: str = "test",
    options: BraTSOptions | None = None,
    kmeans: bool = True,
    teacher: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    more: Mapping[str, Predict] | None = None,
    on_row: Callable[[dict], None] | None = None,
) -> dict:
    """Evaluate discovery networks, alongside k-means, on a split of a BraTS folder.

    Args:
        root: folder of a BraTS edition; every case of the split requires a mask.
        models: discovery networks (folder, Hub id or name of an embedded model) by row name.
        split: train, validation or test, as defined by [`split_cases`].
        options: modality, crop etc.; must equal those of the training of the models.
        kmeans: also evaluate k-means on the intensities, with 3 parts.
        teacher: folder, Hub id or name of a diffusion model. If given, k-means on the features of its decoder stage 2
            is evaluated too.
        seed: random seed of k-means and of the teacher's noise.
        device: device of the networks.
        more: further methods by row name. Each maps a (1, h, w, d) volume in [0, 1] to (h, w, d) part labels.
        on_row: progress callback, called with each row of scores when it is complete.

    Returns:
        JSON values: `rows`, the ids of all splits, the metrics of each case, the arguments, versions, hardware and the
        sha256 of the weights.

    Raises:
        InputError: if a case has no mask or a damaged file, or the `split.json` of a model has different cases in this
            split.
        ModelError, NetworkError: if a model cannot be loaded.
    """
    options = options or BraTSOptions()
    volumes = BraTSVolumes(root, split, options)
    volumes.require_masks()
    networks = {name: load_discovery(source).to(device) for name, source in models.items()}
    found = {name: resolve_model(source) for name, source in models.items()}
    for model in found.values():
        _check_split(model.folder, split, volumes.split_ids[split])
    methods: dict[str, tuple[Predict, int]] = {
        name: (lambda v, n=network: n.segment(v[None]).labels[0].cpu().numpy(), network.config.num_parts)
        for name, network in networks.items()
    }
    if kmeans:
        clusters = IntensityKMeans(NUM_PARTS, seed)
        methods[clusters.name] = (clusters.predict, NUM_PARTS)
    if teacher is not None:
        features = FeaturesKMeans(NUM_PARTS, load_teacher(teacher).to(device), stages=(2,), seed=seed)
        methods[features.name] = (features.predict, NUM_PARTS)
    for name, predict in (more or {}).items():
        methods[name] = (predict, NUM_PARTS)
    rows, cases = [], {}
    for name, (predict, parts) in methods.items():
        both, cases[name] = score_brats(predict, volumes, parts)
        for row in both:
            rows.append({"method": name, "parts": parts, **row})
            if on_row:
                on_row(rows[-1])
    return {
        "preset": "brats",
        "dataset": Path(root).name,
        "models": {name: Path(source).name for name, source in models.items()},
        "teacher": Path(teacher).name if teacher else None,
        "split": split,
        "volumes": len(volumes),
        "options": {
            "modality": options.modality,
            "grade": options.grade,
            "crop": options.crop,
            "clip_percentiles": options.clip_percentiles,
            "split_seed": options.split_seed,
        },
        "seed": seed,
        "rows": rows,
        "cases": cases,
        "split_ids": volumes.split_ids,
        "weights_sha256": {name: model.weights_sha256 for name, model in found.items()},
        "environment": describe_environment(),
    }


def score_brats(predict: Predict, volumes: BraTSVolumes, num_parts: int = NUM_PARTS) -> tuple[list[dict], list[dict]]:
    """Evaluate a method on the cases of a split, scoring the part matched to the whole tumour.

    In each case the parts are matched to background, brain and tumour by the Hungarian algorithm on the cropped grid.
    Dice and HD95 are computed on the uncropped grid, where tumour outside the crop counts as missed.

    Returns:
        Two rows, raw and post-processed, and the metrics of each case. The rows contain `dice`, `dice_std`, `hd95_mm`,
        `hd95_std`, `empty` (number of cases where exactly one mask is empty, whose HD95 is the diagonal of the volume)
        and `seconds`. The first row also contains `dice_one_matching`, with one matching for the whole split.
    """
    matrices, metrics, seconds = [], [], 0.0
    for i in range(len(volumes)):
        item = volumes[i]
        clock = time.perf_counter()
        found = predict(item["volume"])
        seconds += time.perf_counter() - clock
        true = volumes.true_parts(i)
        matrix = dice_matrix(found, volumes.crop(true), num_parts, NUM_PARTS)
        matrices.append(matrix)
        part = _matched(matrix)
        mask = volumes.uncrop(found == part, true.shape) if part is not None else np.zeros(true.shape, bool)
        tumour = true == WHOLE_TUMOUR
        case = {"id": item["name"], "part": part}
        for label, candidate in (("raw", mask), ("postprocessed", clean_mask(mask))):
            case[label] = {
                "dice": binary_dice(candidate, tumour),
                "hd95_mm": hausdorff_95(candidate, tumour, item["spacing_mm"]),
                "empty": bool(candidate.any() != tumour.any()),
            }
        metrics.append(case)
    rows = []
    for label in ("raw", "postprocessed"):
        dice = np.array([case[label]["dice"] for case in metrics])
        distance = np.array([case[label]["hd95_mm"] for case in metrics])
        rows.append(
            {
                "postprocessed": label == "postprocessed",
                "dice": float(dice.mean()),
                "dice_std": float(dice.std()),
                "hd95_mm": float(distance.mean()),
                "hd95_std": float(distance.std()),
                "empty": sum(case[label]["empty"] for case in metrics),
                "seconds": round(seconds, 3),
            }
        )
    mean = np.mean(matrices, axis=0)
    part = _matched(mean)
    rows[0]["dice_one_matching"] = float(mean[part, WHOLE_TUMOUR]) if part is not None else 0.0
    return rows, metrics


def format_brats_rows(rows: Sequence[dict]) -> str:
    """Format rows as a Markdown table."""
    header = ["method", "post-processed", "Dice WT", "std", "HD95 (mm)", "std", "empty"]
    cells = []
    for row in rows:
        dice, distance = (
            (f"{row[k]:.3f}" for k in ("dice", "dice_std")),
            (f"{row[k]:.1f}" for k in ("hd95_mm", "hd95_std")),
        )
        cells.append((row["method"], "yes" if row["postprocessed"] else "no", *dice, *distance, row["empty"]))
    return markdown_table(header, cells)


def _check_split(folder: Path, split: str, ids: Sequence[str]) -> None:
    """Check that the cases equal those of the split recorded by the training, so that no training case is evaluated."""
    path = folder / "split.json"
    if not path.exists():
        return
    recorded = read_model_json(path).get(split)
    if not isinstance(recorded, list) or not all(isinstance(name, str) for name in recorded):
        raise InputError(f"{path}: has no {split} split; copy it again from the training folder.")
    more, fewer = sorted(set(ids) - set(recorded)), sorted(set(recorded) - set(ids))
    if more or fewer:
        differences = [f"{len(d)} {how} ({', '.join(d[:3])})" for d, how in ((more, "more"), (fewer, "missing")) if d]
        raise InputError(
            f"{path}: the {split} cases differ from those of the model's training: {' and '.join(differences)}; give "
            "the complete BraTS folder and the --grade of the training."
        )


def _matched(matrix: np.ndarray) -> int | None:
    """The predicted part matched to the whole tumour, or `None`."""
    predicted, true = match_parts(matrix)
    hits = predicted[true == WHOLE_TUMOUR]
    return int(hits[0]) if len(hits) else None

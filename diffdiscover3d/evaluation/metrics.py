"""Metrics of a segmentation against reference labels."""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment


def dice_matrix(predicted: np.ndarray, true: np.ndarray, num_predicted: int, num_true: int) -> np.ndarray:
    """Dice of every predicted part with every reference part.

    Args:
        predicted, true: integer arrays of the same shape, in [0, num_predicted) and [0, num_true).

    Returns:
        (num_predicted, num_true) in [0, 1]; 0 where both parts are empty.

    Raises:
        ValueError: if shapes differ, the arrays are empty, or a label is out of range.
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    if predicted.shape != true.shape:
        raise ValueError(f"both arrays must have the same shape, got {predicted.shape} and {true.shape}.")
    for name, labels, count in (("predicted", predicted, num_predicted), ("true", true, num_true)):
        if labels.min() < 0 or labels.max() >= count:
            raise ValueError(f"`{name}` must be in 0..{count - 1}, got {labels.min()}..{labels.max()}.")
    pairs = predicted.ravel().astype(np.int64) * num_true + true.ravel()
    overlap = np.bincount(pairs, minlength=num_predicted * num_true).reshape(num_predicted, num_true)
    sizes = overlap.sum(axis=1, keepdims=True) + overlap.sum(axis=0, keepdims=True)
    return np.divide(2 * overlap, sizes, out=np.zeros(overlap.shape), where=sizes > 0)


def match_parts(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match predicted to reference parts by maximising the sum of scores (Hungarian algorithm).

    Returns:
        Two index arrays: predicted parts and the reference part of each.
    """
    return linear_sum_assignment(scores, maximize=True)


def matched_dice(scores: np.ndarray) -> float:
    """Mean Dice over the reference parts of a volume after matching, including background; unmatched parts count 0."""
    return float(scores[match_parts(scores)].sum() / scores.shape[1])


def dataset_dice(matrices: np.ndarray) -> dict[str, float]:
    """Aggregate the Dice matrices of the volumes of a dataset.

    Args:
        matrices: (volumes, num_predicted, num_true).

    Returns:
        `dice`: mean over volumes with a separate matching for each, as in earlier work; `dice_std`: its standard
        deviation over volumes; `dice_one_matching`: Dice with one matching for the whole dataset, which penalises part
        numbers that are inconsistent between volumes.
    """
    matrices = np.asarray(matrices)
    per_volume = np.array([matched_dice(m) for m in matrices])
    one = matched_dice(matrices.mean(axis=0))
    return {"dice": float(per_volume.mean()), "dice_std": float(per_volume.std()), "dice_one_matching": one}


def binary_dice(predicted: np.ndarray, true: np.ndarray) -> float:
    """Dice of two masks; 1 if both are empty."""
    predicted, true = np.asarray(predicted, dtype=bool), np.asarray(true, dtype=bool)
    size = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / size if size else 1.0


def hausdorff_95(predicted: np.ndarray, true: np.ndarray, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> float:
    """95th-percentile Hausdorff distance of two masks, in mm, by MONAI's `compute_hausdorff_distance`.

    This is the maximum of the two directed 95th percentiles of the distances between surface voxels, i.e. voxels with
    a face neighbour outside the mask.

    Args:
        predicted, true: (H, W, D) masks on the same grid.
        spacing_mm: voxel size in mm.

    Returns:
        Distance in mm; 0 if both masks are empty, and the diagonal of the volume if exactly one is empty (373.13 for
        240×240×155 at 1 mm), so that missed structures are included in averages.

    Raises:
        ValueError: if the shapes differ.
    """
    predicted, true = np.asarray(predicted, dtype=bool), np.asarray(true, dtype=bool)
    if predicted.shape != true.shape:
        raise ValueError(f"both arrays must have the same shape, got {predicted.shape} and {true.shape}.")
    if not predicted.any() or not true.any():
        diagonal = float(np.linalg.norm(np.multiply(predicted.shape, spacing_mm)))
        return diagonal if predicted.any() or true.any() else 0.0
    import torch
    from monai.metrics import compute_hausdorff_distance

    pair = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (predicted, true))
    spacing = [float(edge) for edge in spacing_mm]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 passes itself an argument that it has deprecated
        return float(compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing))

"""Evaluation of models on synthetic cells, alongside k-means."""

import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from diffdiscover3d.baselines.kmeans import IntensityKMeans
from diffdiscover3d.data.datasets.synthetic import GENERATOR_VERSION, LEVEL_PARTS
from diffdiscover3d.data.loading import SYNTHETIC_NAMES, load_volumes
from diffdiscover3d.errors import InputError
from diffdiscover3d.evaluation.metrics import dataset_dice, dice_matrix
from diffdiscover3d.hub.registry import DEFAULT_MODEL, load_discovery
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.reporting.markdown import markdown_table
from diffdiscover3d.utils.provenance import describe_environment


def evaluate(
    model: str = DEFAULT_MODEL,
    dataset: str = "synthetic-regular",
    split: str = "test",
    levels: Sequence[int] | None = None,
    seed: int = 0,
    on_row: Callable[[dict], None] | None = None,
) -> dict:
    """Compute the Dice of a model and of intensity k-means on a synthetic dataset.

    Args:
        model: name of an embedded model, or folder or Hub id of a discovery network. The network and its ancestors are
            evaluated at the levels with their number of parts.
        dataset, split: as for [`load_volumes`]; the dataset must have labels.
        levels: levels to evaluate; default: all levels of the model.
        seed: random seed of k-means.
        on_row: progress callback, called with each row of scores when it is complete.

    Returns:
        JSON values: `rows` (method, level, parts, dice, dice_std, dice_one_matching, seconds), the arguments,
        versions and hardware, and the sha256 of the weights.

    Raises:
        InputError: if the dataset has no labels, or the model has no network for the requested levels.
        ModelError: if the model cannot be loaded.
    """
    if dataset not in SYNTHETIC_NAMES:
        raise InputError(f"{dataset}: has no labels; choose one of {', '.join(SYNTHETIC_NAMES)}.")
    networks = _load_levels(model, levels)
    volumes = load_volumes(dataset, split)
    rows = []
    for level, network in networks.items():
        kmeans = IntensityKMeans(LEVEL_PARTS[level], seed)
        methods = {
            "diffdiscover3d": lambda v, n=network: n.segment(v[None]).labels[0].numpy(),
            kmeans.name: kmeans.predict,
        }
        for name, predict in methods.items():
            rows.append({"method": name, "level": level, "parts": LEVEL_PARTS[level], **score(predict, volumes, level)})
            if on_row:
                on_row(rows[-1])
    return {
        "model": model,
        "dataset": dataset,
        "split": split,
        "volumes": len(volumes),
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "rows": rows,
        "weights_sha256": resolve_model(model).weights_sha256,
        "environment": describe_environment(),
    }


def score(predict: Callable[[torch.Tensor], np.ndarray], volumes: Sequence[dict], level: int) -> dict[str, float]:
    """Evaluate a method on volumes at one level of the hierarchy."""
    parts, matrices, clock = LEVEL_PARTS[level], [], time.perf_counter()
    for i in range(len(volumes)):
        labels = predict(volumes[i]["volume"])
        matrices.append(dice_matrix(labels, volumes[i]["labels"][level - 1].numpy(), parts, parts))
    return {**dataset_dice(np.stack(matrices)), "seconds": round(time.perf_counter() - clock, 3)}


def format_rows(rows: Sequence[dict]) -> str:
    """Format rows as a Markdown table."""
    header = ["level", "parts", "method", "Dice", "std", "Dice, one matching"]
    scores = ("dice", "dice_std", "dice_one_matching")
    cells = [(r["level"], r["parts"], r["method"], *(f"{r[score]:.3f}" for score in scores)) for r in rows]
    return markdown_table(header, cells)


def _load_levels(model: str, levels: Sequence[int] | None) -> dict[int, StructureDiscoveryModel]:
    """The networks to evaluate, by level."""
    networks = {network.config.num_parts: network for network in load_discovery(model).levels}
    found = {level: networks[parts] for level, parts in LEVEL_PARTS.items() if parts in networks}
    chosen = {level: network for level, network in found.items() if not levels or level in levels}
    if not chosen:
        raise InputError(
            f"{model}: has {', '.join(map(str, networks))} parts; the levels have {json.dumps(LEVEL_PARTS)} "
            "(level: parts)."
        )
    return chosen

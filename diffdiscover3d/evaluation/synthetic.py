"""Score models on synthetic cells, beside k-means run in the same breath."""

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
from diffdiscover3d.hub.registry import DEFAULT_MODEL, discovery_folder, load_discovery
from diffdiscover3d.models.structure_discovery import StructureDiscoveryModel
from diffdiscover3d.utils.provenance import describe_environment, weights_sha256


def evaluate(
    model: str = DEFAULT_MODEL,
    dataset: str = "synthetic-regular",
    split: str = "test",
    levels: Sequence[int] | None = None,
    seed: int = 0,
    report: Callable[[dict], None] | None = None,
) -> dict:
    """Dice of a model and of intensity k-means on a synthetic dataset.

    Args:
        model: an embedded model's name, or a folder or Hub id of a discovery network. A network, and each coarser one
            that it divides, is scored at the level with its number of parts.
        dataset, split: as for [`load_volumes`]; it must have labels.
        levels: which levels; default: all the model has.
        seed: of k-means.
        report: called with each row as soon as it is there.

    Returns:
        JSON values: `rows` (method, level, parts, dice, dice_std, dice_one_matching, seconds), the arguments,
        versions and hardware, and the sha256 of the weights.

    Raises:
        InputError: if the dataset has no labels, or the model's number of parts is that of no level asked for.
        ModelError: if the model cannot be loaded.
    """
    if dataset not in SYNTHETIC_NAMES:
        raise InputError(f"{dataset}: has no labels to score against; choose one of {', '.join(SYNTHETIC_NAMES)}.")
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
            if report:
                report(rows[-1])
    return {
        "model": model,
        "dataset": dataset,
        "split": split,
        "volumes": len(volumes),
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "rows": rows,
        "weights_sha256": weights_sha256(discovery_folder(model)),
        "environment": describe_environment(),
    }


def score(predict: Callable[[torch.Tensor], np.ndarray], volumes: Sequence[dict], level: int) -> dict[str, float]:
    """Run a method over volumes and score it at a level of the hierarchy."""
    parts, matrices, clock = LEVEL_PARTS[level], [], time.perf_counter()
    for i in range(len(volumes)):
        labels = predict(volumes[i]["volume"])
        matrices.append(dice_matrix(labels, volumes[i]["labels"][level - 1].numpy(), parts, parts))
    return {**dataset_dice(np.stack(matrices)), "seconds": round(time.perf_counter() - clock, 3)}


def format_rows(rows: Sequence[dict]) -> str:
    """Rows as a Markdown table."""
    lines = ["| level | parts | method | Dice | std | Dice, one matching |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['level']} | {row['parts']} | {row['method']} | {row['dice']:.3f} | {row['dice_std']:.3f} "
            f"| {row['dice_one_matching']:.3f} |"
        )
    return "\n".join(lines)


def _load_levels(model: str, levels: Sequence[int] | None) -> dict[int, StructureDiscoveryModel]:
    """The networks to score, by level."""
    networks = {network.config.num_parts: network for network in load_discovery(model).levels}
    found = {level: networks[parts] for level, parts in LEVEL_PARTS.items() if parts in networks}
    chosen = {level: network for level, network in found.items() if not levels or level in levels}
    if not chosen:
        raise InputError(
            f"{model}: has {', '.join(map(str, networks))} parts; the levels have {json.dumps(LEVEL_PARTS)} "
            "(level: parts)."
        )
    return chosen

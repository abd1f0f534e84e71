"""How hard the synthetic cells are: k-means and BM4D + k-means on the test volumes beside the published figures.

python -m benchmarks.paper.calibrate            (about six minutes; needs the extra bm4d)

Writes results/calibration.json and results/calibration.png. The published figures are of the original volumes, which
cannot be had; a variant counts as calibrated if each of its six figures is within 0.05 of the published one.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

from benchmarks import RESULTS
from diffdiscover3d.baselines.bm4d_kmeans import BM4DKMeans
from diffdiscover3d.baselines.kmeans import IntensityKMeans
from diffdiscover3d.data.datasets.synthetic import GENERATOR_VERSION, LEVEL_PARTS, VARIANTS
from diffdiscover3d.data.loading import load_volumes
from diffdiscover3d.evaluation.metrics import dataset_dice, dice_matrix
from diffdiscover3d.evaluation.published import PUBLISHED_DICE
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOLERANCE = 0.05


def measure(variant: str) -> dict[str, list[float]]:
    """Dice of both methods at the three levels; each volume is denoised once for all of them."""
    volumes = load_volumes(f"synthetic-{variant}", "test")
    matrices = {name: {level: [] for level in LEVEL_PARTS} for name in ("k-means", "BM4D + k-means")}
    for i in range(len(volumes)):
        views = {"k-means": volumes[i]["volume"]}
        views["BM4D + k-means"] = torch.from_numpy(BM4DKMeans(2).denoise(volumes[i]["volume"]))[None]
        for level, parts in LEVEL_PARTS.items():
            true = volumes[i]["labels"][level - 1].numpy()
            for name, view in views.items():
                found = IntensityKMeans(parts).predict(view)
                matrices[name][level].append(dice_matrix(found, true, parts, parts))
    return {name: [dataset_dice(np.stack(m))["dice"] for m in levels.values()] for name, levels in matrices.items()}


def plot(rows: list[dict], target: Path) -> None:
    """Measured against published, with the tolerance as a band."""
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    axis.fill_between([0, 1], [-TOLERANCE, 1 - TOLERANCE], [TOLERANCE, 1 + TOLERANCE], color="0.9")
    for variant, marker in zip(VARIANTS, "os", strict=True):
        for method, colour in (("k-means", "tab:orange"), ("BM4D + k-means", "tab:blue")):
            chosen = [r for r in rows if r["variant"] == variant and r["method"] == method]
            x, y = [r["published"] for r in chosen], [r["dice"] for r in chosen]
            axis.plot(x, y, marker, color=colour, label=f"{variant}, {method}", fillstyle="none")
    axis.set(xlabel="published Dice", ylabel="Dice on these volumes", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(target, dpi=130)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for variant in VARIANTS:
        for method, dice in measure(variant).items():
            for level, published, value in zip(LEVEL_PARTS, PUBLISHED_DICE[variant, method], dice, strict=True):
                within = abs(value - published) <= TOLERANCE
                rows.append({
                    "variant": variant, "method": method, "level": level,
                    "dice": value, "published": published, "within_tolerance": within,
                })  # fmt: skip
                print(f"{variant} {method} level {level}: {value:.3f}, published {published:.3f}, {within}", flush=True)
    result = {
        "split": "test",
        "volumes": 20,
        "seed": 0,
        "tolerance": TOLERANCE,
        "generator_version": GENERATOR_VERSION,
        "rows": rows,
        "environment": describe_environment(),
    }
    write_json(RESULTS / "calibration.json", result)
    plot(rows, RESULTS / "calibration.png")


if __name__ == "__main__":
    main()

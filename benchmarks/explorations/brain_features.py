"""k-means on the diffusion features of MS scans, with the diffusion model of `brain-flair` and that of the cells.

    python -m benchmarks.explorations.brain_features FOLDER      (about ten minutes on one core)

FOLDER holds `<case>_flair.nii.gz` and `<case>_lesion.nii.gz`; names in `brats` are left out. A scan is resampled to
1.5 mm, its features at t = 25 are averaged over 4 draws of noise, and k-means divides the whole volume into 3 clusters,
or the brain into 3 or 8. The brightest cluster within the brain, brought back to the scan's grid, counts as lesion, as
in the baselines of `benchmarks.paper.brains`. `dice_chosen_with_mask` is that of the best cluster, a bound: it is high
where any cluster covers the lesions. "intensities" is k-means on the resampled scan alone. Rows are means over scans.

`clean_prediction` is the mean absolute error of the predicted clean volume, of intensities in [0, 1], on ten phantoms,
which neither model was trained on.
Writes `results/brain-features.json`.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from benchmarks import RESULTS
from benchmarks.paper.brains import SAMPLE, read_case
from diffdiscover3d.baselines.features_kmeans import join_equally
from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.data.transforms import min_max_normalize, resize_volume
from diffdiscover3d.evaluation.metrics import binary_dice, hausdorff_95
from diffdiscover3d.hub.registry import embedded_models, load_teacher
from diffdiscover3d.pipelines.diffusion_feature import DiffusionFeaturePipeline
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment, weights_sha256

TEACHERS = ("brain-flair", "synthetic-regular")
INTENSITIES = "intensities"
STAGES = ((1,), (2,), (3,), (1, 2, 3))
CLUSTERINGS = (("volume", 3), ("brain", 3), ("brain", 8))  # what is divided, and into how many clusters
SPACING_MM = 1.5
TIMESTEP, DRAWS = 25, 4
PHANTOMS = range(10)


def resample(volume: np.ndarray, spacing_mm: Sequence[float]) -> torch.Tensor:
    """(1, 1, h, w, d) of an (H, W, D) scan, with voxels of about 1.5 mm."""
    grid = [max(2, round(n * s / SPACING_MM)) for n, s in zip(volume.shape, spacing_mm, strict=True)]
    return resize_volume(torch.from_numpy(volume)[None, None].float(), grid)


def signals(volume: torch.Tensor, teachers: dict[str, DiffusionFeaturePipeline], seed: int) -> Iterator[tuple]:
    """Name, decoder stages and (voxels, channels) of the intensities and of each teacher's features."""
    yield INTENSITIES, (), volume.reshape(-1, 1).numpy()
    for name, teacher in teachers.items():
        generator = torch.Generator().manual_seed(seed)
        found = teacher(volume, TIMESTEP, (1, 2, 3), generator, DRAWS, upsample=True)
        maps = [f[0].flatten(1).T.numpy() for f in found.features]
        for stages in STAGES:
            chosen = [maps[stage - 1] for stage in stages]
            yield name, stages, chosen[0] if len(chosen) == 1 else join_equally(chosen)


def cluster(signal: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The k-means cluster of each row of (voxels, channels), fitted to a sample of them."""
    rows = np.random.default_rng(seed).choice(len(signal), min(SAMPLE, len(signal)), replace=False)
    return KMeans(count, n_init=3, random_state=seed).fit(signal[rows]).predict(signal)


def to_scan(mask: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A mask on the resampled grid, on that of the scan."""
    mask = torch.from_numpy(mask.astype(np.float32))[None, None]
    return (F.interpolate(mask, size=tuple(shape), mode="trilinear", align_corners=False)[0, 0] > 0.5).numpy()


def measure(path: Path, teachers: dict[str, DiffusionFeaturePipeline], seed: int) -> list[dict]:
    """One row for each signal and clustering of a scan."""
    volume, lesion, spacing = read_case(path)
    small = resample(volume, spacing)
    values = small.flatten().numpy()
    brain = (resample((volume > 0).astype(np.float32), spacing) > 0.5).flatten().numpy()
    rows = []
    for name, stages, signal in signals(small, teachers, seed):
        for divided, count in CLUSTERINGS:
            within = brain if divided == "brain" else np.ones_like(brain)
            labels = np.full(len(values), -1)
            labels[within] = cluster(signal[within], count, seed)
            labels[~brain] = -1
            masks = {k: to_scan((labels == k).reshape(small.shape[2:]), volume.shape) for k in np.unique(labels[brain])}
            brightest = masks[max(masks, key=lambda k: values[labels == k].mean())]
            rows.append(
                {
                    "teacher": name,
                    "stages": list(stages),
                    "divided": divided,
                    "clusters": count,
                    "dice": binary_dice(brightest, lesion),
                    "hd95_mm": hausdorff_95(brightest, lesion, spacing),
                    "dice_chosen_with_mask": max(binary_dice(mask, lesion) for mask in masks.values()),
                }
            )
    return rows


def summarise(cases: dict[str, list[dict]]) -> list[dict]:
    """Means over the scans of each signal and clustering; all scans have the same rows in the same order."""
    summary = []
    for group in zip(*cases.values(), strict=True):
        row = {key: group[0][key] for key in ("teacher", "stages", "divided", "clusters")}
        for key in ("dice", "hd95_mm", "dice_chosen_with_mask"):
            row[key] = float(np.mean([one[key] for one in group]))
        summary.append({**row, "dice_std": float(np.std([one["dice"] for one in group]))})
    return summary


def prediction_errors(teachers: dict[str, DiffusionFeaturePipeline], seed: int) -> list[dict]:
    """Mean absolute error of the clean prediction of each teacher and timestep, over phantoms."""
    volumes = [brain_phantom("test", index).volume for index in PHANTOMS]
    rows = []
    for name, teacher in teachers.items():
        for timestep in (25, 100, 200):
            errors = []
            for volume in volumes:
                clean = min_max_normalize(torch.from_numpy(volume)[None, None])
                generator = torch.Generator().manual_seed(seed)
                found = teacher(volume, timestep, (1,), generator, denoised=True).denoised
                errors.append(float((found - clean).abs().mean()))
            rows.append({"teacher": name, "timestep": timestep, "mean_absolute_error": float(np.mean(errors))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scans and masks of lesions; names in `brats` are left out")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the clusterings")
    parser.add_argument("--output", type=Path, default=RESULTS / "brain-features.json")
    arguments = parser.parse_args()
    teachers = {name: load_teacher(name) for name in TEACHERS}
    cases = {}
    for path in sorted(p for p in arguments.folder.glob("*_flair.nii.gz") if not p.name.startswith("brats")):
        name = path.name.removesuffix("_flair.nii.gz")
        cases[name] = measure(path, teachers, arguments.seed)
        print(name, flush=True)
    result = {
        "command": f"python -m benchmarks.explorations.brain_features FOLDER --seed {arguments.seed}",
        "seed": arguments.seed,
        "timestep": TIMESTEP,
        "draws": DRAWS,
        "spacing_mm": SPACING_MM,
        "weights_sha256": {name: weights_sha256(embedded_models()[name].diffusion) for name in TEACHERS},
        "means": summarise(cases),
        "cases": cases,
        "clean_prediction": prediction_errors(teachers, arguments.seed),
        "environment": describe_environment(),
    }
    write_json(arguments.output, result)
    for row in result["means"] + result["clean_prediction"]:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()

"""Scores of `brain-flair` on brains with known lesions, beside simple methods that need no labels either.

    python -m benchmarks.paper.brains FOLDER                       (model brain-flair)
    python -m benchmarks.paper.brains FOLDER --model MODEL_FOLDER --output FILE

FOLDER holds `<case>_flair.nii.gz` and `<case>_lesion.nii.gz`. Cases whose name begins with `brats` are gliomas, scored
plain and post-processed ([`clean_mask`]); the others are MS scans, whose many lesions post-processing would remove. The
command writes `results/brains.json` with the scores of every case, and pictures of the best, median and worst, those of
gliomas without the scan. Baselines already in the file are kept. Healthy brains are the MS scans with their bright
outliers smoothed away, and phantoms without a lesion.

No baseline may choose with the mask; "best threshold" does, per scan, and is the bound of all thresholds.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.brain_phantom import SPACING_MM, brain_phantom
from diffdiscover3d.data.datasets.brain_scans import frame_scan
from diffdiscover3d.data.foreground import Frame, find_foreground
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.evaluation.metrics import binary_dice, hausdorff_95
from diffdiscover3d.evaluation.postprocessing import clean_mask
from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.hub.resolve import resolve_model
from diffdiscover3d.reporting.pictures import save_cuts
from diffdiscover3d.training.brain_assignments import bright_outliers, smooth_away
from diffdiscover3d.utils.files import read_json, sha256, write_json
from diffdiscover3d.utils.provenance import describe_environment

LESION = 2
BOUND = "best threshold, mask known"
SAMPLE = 50_000  # voxels to which clusterings are fitted
WHOLE = (240, 240, 155)  # grid of a BraTS scan
Find = Callable[[np.ndarray], np.ndarray]


def kmeans(inside: bool) -> Find:
    """The brightest of three k-means clusters, of the brain or of the whole volume."""

    def find(volume: np.ndarray) -> np.ndarray:
        values = volume[volume > 0] if inside else volume.ravel()
        picked = np.random.default_rng(0).choice(values, SAMPLE, replace=False)[:, None]
        clusters = KMeans(3, n_init=3, random_state=0).fit(picked)
        found = clusters.predict(volume.reshape(-1, 1)).reshape(volume.shape)
        return (found == clusters.cluster_centers_[:, 0].argmax()) & (volume > 0)

    return find


def mixture(volume: np.ndarray) -> np.ndarray:
    """The brightest of five Gaussian components of the brain."""
    brain = volume > 0
    picked = np.random.default_rng(0).choice(volume[brain], SAMPLE, replace=False)[:, None]
    fitted = GaussianMixture(5, random_state=0, n_init=2).fit(picked)
    found = np.zeros(volume.shape, dtype=bool)
    found[brain] = fitted.predict(volume[brain][:, None]) == fitted.means_[:, 0].argmax()
    return found


def first_assignment(volume: np.ndarray) -> np.ndarray:
    """The training-free assignment with which the training of `brain-flair` begins."""
    grid = (96, 112, 96)
    item = frame_scan(torch.from_numpy(volume), grid)
    found = bright_outliers(item["volume"][None], item["foreground"][None]).float()
    frame = Frame.around(find_foreground(torch.from_numpy(volume)[None, None]), grid)
    return (frame.paste(torch.cat([1 - found, found], dim=1))[0, 1] > 0.5).numpy()


def best_threshold(volume: np.ndarray, lesion: np.ndarray, cleaned: bool) -> tuple[float, np.ndarray]:
    """The best of 40 thresholds of a scan, chosen with the mask: its Dice, and what it finds."""
    levels = np.quantile(
        volume[volume > 0], np.concatenate([np.linspace(0.5, 0.98, 25), np.linspace(0.982, 0.9999, 15)])
    )
    found = [volume > level for level in levels]
    found = [clean_mask(f) for f in found] if cleaned else found
    return max(((binary_dice(f, lesion), f) for f in found), key=lambda pair: pair[0])


BASELINES: dict[str, Find] = {
    "k-means, 3 clusters": kmeans(inside=False),
    "k-means, 3 clusters in the brain": kmeans(inside=True),
    "Gaussian mixture of 5, brightest": mixture,
    "first assignment": first_assignment,
}


def score(found: np.ndarray, lesion: np.ndarray, spacing_mm, glioma: bool) -> dict:
    """Dice, HD95 and volumes of a mask; of gliomas also after post-processing."""
    row = {
        "dice": binary_dice(found, lesion),
        "hd95_mm": hausdorff_95(found, lesion, spacing_mm),
        "found_ml": float(found.sum() * np.prod(spacing_mm) / 1000),
    }
    if glioma:
        cleaned = clean_mask(found)
        row["postprocessed"] = {
            "dice": binary_dice(cleaned, lesion),
            "hd95_mm": hausdorff_95(cleaned, lesion, spacing_mm),
        }
    return row


def read_case(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """A scan, the mask of its lesions and its spacing in mm."""
    scan = read_nifti(path)
    lesion = read_nifti(Path(str(path).replace("_flair", "_lesion")), allow_constant=True).data > 0.5
    return scan.data, lesion, scan.spacing_mm


def score_baselines(path: Path) -> dict[str, dict]:
    """All simple methods on one scan."""
    volume, lesion, spacing = read_case(path)
    glioma = path.name.startswith("brats")
    rows = {name: score(find(volume), lesion, spacing, glioma) for name, find in BASELINES.items()}
    rows[BOUND] = score(best_threshold(volume, lesion, cleaned=False)[1], lesion, spacing, False)
    if glioma:
        dice, found = best_threshold(volume, lesion, cleaned=True)
        rows[BOUND]["postprocessed"] = {"dice": dice, "hd95_mm": hausdorff_95(found, lesion, spacing)}
    return rows


def score_model(path: Path, network) -> dict:
    """The model on one scan."""
    volume, lesion, spacing = read_case(path)
    clock = time.perf_counter()
    labels = network.segment(volume).labels[0].numpy()
    seconds = time.perf_counter() - clock
    return score(labels == LESION, lesion, spacing, path.name.startswith("brats")) | {
        "lesion_ml": float(lesion.sum() * np.prod(spacing) / 1000),
        "brain_dice": binary_dice(labels > 0, volume != volume[0, 0, 0]),
        "seconds": round(seconds, 1),
    }


def score_healthy(paths: list[Path], network) -> dict[str, float]:
    """Millilitres of lesion found in healthy brains."""
    found = {}
    for path in paths:
        scan = read_nifti(path)
        item = frame_scan(torch.from_numpy(scan.data), network.config.frame)
        volume, brain = item["volume"][None], item["foreground"][None]
        healthy = smooth_away(volume, brain, bright_outliers(volume, brain))
        labels = network.segment(healthy).labels
        frame = Frame.around(find_foreground(torch.from_numpy(scan.data)[None, None]), network.config.frame)
        voxel = float(np.prod(np.divide(frame.size, frame.grid)) * np.prod(scan.spacing_mm)) / 1000
        found[f"{path.name.removesuffix('_flair.nii.gz')}, outliers smoothed away"] = (
            float((labels == LESION).sum()) * voxel
        )
    for index in range(3, 40, 4):  # of every four phantoms, the last has no lesion
        labels = network.segment(brain_phantom("test", index).volume).labels
        found[f"brain-phantom-test-{index:03d}"] = float((labels == LESION).sum()) * SPACING_MM**3 / 1000
    return {name: round(volume, 3) for name, volume in found.items()}


def measure_segment(path: Path, model: str) -> dict:
    """Seconds and peak memory of `segment` on a scan laid into the grid of BraTS, process and model load included."""
    scan = read_nifti(path).data
    whole = np.zeros(WHOLE, dtype=np.float32)
    size = tuple(min(a, b) for a, b in zip(scan.shape, WHOLE, strict=True))
    box = tuple(slice(0, n) for n in size)
    whole[box] = scan[box]
    with tempfile.TemporaryDirectory() as folder:
        nib.save(nib.Nifti1Image(whole, np.eye(4)), Path(folder) / "scan.nii.gz")
        command = [sys.executable, "-m", "diffdiscover3d.cli", "segment", f"{folder}/scan.nii.gz", "--model", model]
        clock = time.perf_counter()
        subprocess.run([*command, "--output", f"{folder}/out"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - clock
        sidecar = read_json(next(Path(folder, "out").glob("*.json")))
    return {"shape": list(WHOLE), "seconds": round(seconds, 1), "peak_memory_mib": sidecar["peak_memory_mib"]}


def draw(path: Path, names: list[str], titles: list[str], folder: Path, network, with_scan: bool) -> None:
    """Slices through the lesions of some cases: found and true green, missed red, marked in error blue.

    Args:
        with_scan: show the scan below; without it only label maps are drawn, as the licence of BRATS 2013 asks.
    """
    rows = []
    for name in names:
        volume, lesion, _ = read_case(folder / f"{name}_flair.nii.gz")
        labels = network.segment(volume).labels[0].numpy()
        found = labels == LESION
        grey = np.clip(volume / np.percentile(volume[volume > 0], 99.5), 0, 1) if with_scan else 0.25 * (labels > 0)
        colours = np.stack([lesion & ~found, lesion & found, found & ~lesion]).astype(float)
        weight = 0.55 * (lesion | found)
        picture = grey * (1 - weight) + colours * weight if with_scan else np.maximum(grey, colours)
        centres = [int((lesion | found).sum(axis=tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3)]
        rows.append([picture.take(centre, axis=axis + 1) for axis, centre in enumerate(centres)])
    save_cuts(path, rows, [None] * len(rows), spacing_mm=(1.0, 1.0, 1.0), titles=titles, num_parts=None)


def draw_extremes(scores: dict[str, dict], folder: Path, network) -> None:
    """The best, median and worst case of gliomas and of MS scans, as PNG beside the results."""
    for kind, glioma in (("glioma", True), ("ms", False)):
        ranked = sorted((n for n in scores if n.startswith("brats") == glioma), key=lambda n: -scores[n]["dice"])
        if ranked:
            names = [ranked[0], ranked[len(ranked) // 2], ranked[-1]]
            titles = [f"{n}, Dice {scores[n]['dice']:.2f}" for n in names]
            draw(RESULTS / f"brains-{kind}.png", names, titles, folder, network, with_scan=not glioma)


def mean_scores(cases: dict[str, dict]) -> list[dict]:
    """Means over the gliomas and over the MS scans for each method."""
    rows = []
    for kind, glioma in (("glioma", True), ("MS", False)):
        chosen = [row for name, row in cases.items() if name.startswith("brats") == glioma]
        for method in chosen[0] if chosen else ():
            scores = [row[method] for row in chosen]
            row = {"lesion": kind, "method": method, "cases": len(scores)}
            for key in ("dice", "hd95_mm"):
                row[key] = float(np.mean([s[key] for s in scores]))
                if glioma:
                    row[f"{key}_postprocessed"] = float(np.mean([s["postprocessed"][key] for s in scores]))
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scans and masks of lesions")
    parser.add_argument("--model", default="brain-flair", help="name or folder of a model; none: baselines only")
    parser.add_argument("--match", default="", help="only cases whose name begins so")
    parser.add_argument("--output", type=Path, default=RESULTS / "brains.json")
    arguments = parser.parse_args()
    before = read_json(arguments.output) if arguments.output.exists() else {}
    paths = sorted(p for p in arguments.folder.glob("*_flair.nii.gz") if p.name.startswith(arguments.match))
    baselines = before.get("baselines", {})
    for path in paths:
        if (name := path.name.removesuffix("_flair.nii.gz")) not in baselines:
            baselines[name] = score_baselines(path)
            print(name, {m: round(s["dice"], 3) for m, s in baselines[name].items()}, flush=True)
    result = {**before, "baselines": baselines, "environment": describe_environment()}
    write_json(arguments.output, result)
    if arguments.model == "none":
        return
    network = load_discovery(arguments.model)
    resolved = resolve_model(arguments.model)
    weights = {**resolved.weights_sha256, "config.json": sha256(resolved.folder / "config.json")}
    scores = {}
    for path in paths:
        name = path.name.removesuffix("_flair.nii.gz")
        scores[name] = score_model(path, network)
        print(name, scores[name], flush=True)
    ms = [p for p in paths if not p.name.startswith("brats")]
    result |= {
        "model": Path(arguments.model).name,
        "weights_sha256": weights,
        "scores": scores,
        "means": mean_scores({name: {"brain-flair": row, **baselines[name]} for name, row in scores.items()}),
        "healthy_lesion_ml": score_healthy(ms, network),
        "segment": measure_segment(ms[0], arguments.model) if ms else None,
    }
    write_json(arguments.output, result)
    if arguments.output.parent == RESULTS:
        draw_extremes(scores, arguments.folder, network)
    for row in result["means"]:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    print(result["healthy_lesion_ml"], result["segment"])


if __name__ == "__main__":
    main()

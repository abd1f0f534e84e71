"""Mirror images and the moments of ordinary tissue in `segment` of `brain-flair`, on implants and MS scans.

    python -m benchmarks.explorations.lesions FOLDER      (about five minutes on two cores)

FOLDER holds the MS scans `<case>_flair.nii.gz` and `<case>_lesion.nii.gz`. Scenes are drawn as in the training: these
scans, their bright outliers smoothed away, with implanted lesions. The network's logit is of a scan, or of the average
over a scan and its mirror image; the evidence of the intensities uses median and spread of the whole brain, or computes
them again from what is not marked (`add_brightness`). Writes `results/lesions.json`: Dice in the network's frame, and
millilitres in scans without lesions.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.brain_scans import frame_scan
from diffdiscover3d.data.foreground import Frame, add_brightness, brightness_evidence, find_foreground
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.evaluation.metrics import binary_dice
from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.training.brain_assignments import bright_outliers, smooth_away
from diffdiscover3d.training.brain_scenes import SceneOptions, draw_scene
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

SCENES, FIRST_SEED = 36, 1000
# lesions that are large enough to be seen; a large one fills more than this share of the brain
OPTIONS, LARGE = SceneOptions(implants=(0, 0.7, 0.2, 0.1), spots=0.15, radius=(0.12, 0.55)), 0.08


def find(network, scan: torch.Tensor, brain: torch.Tensor) -> dict[str, np.ndarray]:
    """Lesions of a (1, 1, H, W, D) scan in its frame by each rule, (H, W, D) bool."""
    with torch.no_grad():
        soft, turned = (network.scaled_logits(x).softmax(dim=1).clamp(min=1e-9) for x in (scan, scan.flip(2)))
    found = {}
    for name, shares in (("scan", soft), ("scan and mirror image", (soft + turned.flip(2)) / 2)):
        logit = (shares[:, 2:] / shares[:, 1:2]).log()
        found[f"{name}, moments of the brain"] = logit.clamp(-6, 6) + brightness_evidence(scan, brain) > 0
        found[f"{name}, moments of ordinary tissue"] = add_brightness(logit, scan, brain) > 0
    return {name: (mask & brain)[0, 0].numpy() for name, mask in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="MS scans and masks of their lesions; names in `brats` are left out")
    arguments = parser.parse_args()
    network = load_discovery("brain-flair").eval()
    rows: dict[str, dict[str, list[float]]] = {}

    def add(group: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            rows.setdefault(name, {}).setdefault(group, []).append(value)

    healthy = []
    for path in sorted(p for p in arguments.folder.glob("*_flair.nii.gz") if not p.name.startswith("brats")):
        file = read_nifti(path)
        mask = read_nifti(Path(str(path).replace("_flair", "_lesion")), allow_constant=True).data > 0.5
        item = frame_scan(torch.from_numpy(file.data), network.config.frame)
        scan, brain = item["volume"][None], item["foreground"][None].bool()
        frame = Frame.around(find_foreground(torch.from_numpy(file.data)[None, None]), network.config.frame)
        lesion = (frame.crop(torch.from_numpy(mask.astype(np.float32))[None, None]) > 0.5)[0, 0].numpy()
        add("ms_dice", {name: binary_dice(found, lesion) for name, found in find(network, scan, brain).items()})
        healthy.append((smooth_away(scan, brain, bright_outliers(scan, brain)), brain))
        voxel_ml = float(np.prod(np.divide(frame.size, frame.grid)) * np.prod(file.spacing_mm)) / 1000
        without = find(network, *healthy[-1])
        add("without_lesions_ml", {name: float(found.sum()) * voxel_ml for name, found in without.items()})
    for number in range(SCENES):
        tissue, brain = healthy[number % len(healthy)]
        generator = torch.Generator().manual_seed(FIRST_SEED + number)
        scene = draw_scene(tissue, brain.float(), torch.zeros_like(tissue), generator, OPTIONS)
        lesion = ((scene.conspicuous > 1) & scene.foreground)[0, 0].numpy()
        size = "large" if lesion.sum() > LARGE * scene.foreground.sum() else "small"
        scores = {n: binary_dice(found, lesion) for n, found in find(network, scene.view, scene.foreground).items()}
        add(f"{size}_implants_dice", scores)
    means = {name: {g: round(float(np.mean(v)), 4) for g, v in groups.items()} for name, groups in rows.items()}
    counts = {group: len(values) for group, values in next(iter(rows.values())).items()}
    result = {
        "command": "python -m benchmarks.explorations.lesions FOLDER",
        "first_seed": FIRST_SEED,
        "counts": counts,
        "means": means,
        "environment": describe_environment(),
    }
    write_json(RESULTS / "lesions.json", result)
    for name, groups in means.items():
        print(name, groups)


if __name__ == "__main__":
    main()

"""Rules by which `segment` of `brain-flair` decides on each voxel, on implants and MS scans.

    python -m benchmarks.explorations.lesions FOLDER      (about ten minutes on two cores)

FOLDER holds the MS scans `<case>_flair.nii.gz` and `<case>_lesion.nii.gz`. Scenes are drawn as in the training: these
scans, their bright outliers smoothed away, with implanted lesions. All rules begin with the network's logit of a scan,
or of the average over a scan and its mirror image, and the evidence of the intensities (`add_brightness`); `RULES`
describes them. Each is compared with the rule named in `BEFORE`. Writes `results/lesions.json`: Dice in the network's
frame, and millilitres in scans without lesions.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.brain_scans import frame_scan
from diffdiscover3d.data.foreground import Frame, find_foreground
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.evaluation.metrics import binary_dice
from diffdiscover3d.hub.registry import load_discovery
from diffdiscover3d.models.brightness import add_brightness
from diffdiscover3d.training.brain_assignments import bright_outliers, smooth_away
from diffdiscover3d.training.brain_scenes import SceneOptions, draw_scene
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

BEFORE, NOW = "mirror image, moments below 0", "mirror image, moments below -4, threshold nearby"
LARGE = 0.08  # share of the brain above which an implant of the first group is large
# number of scenes, first seed and options of each group; lesions are large enough to be seen
SCENES = {
    "implants": (36, 1000, SceneOptions(implants=(0, 0.7, 0.2, 0.1), spots=0.15, radius=(0.12, 0.55))),
    "very_large_implants": (18, 3000, SceneOptions(implants=(0.0, 1.0, 0.0, 0.0), spots=0.0, radius=(0.45, 0.65))),
    "implants_with_cores": (
        18,
        4000,
        SceneOptions(implants=(0.0, 1.0, 0.0, 0.0), spots=0.0, radius=(0.3, 0.55), core=1.0),
    ),
}


@dataclass
class Case:
    """A scan in its frame, what the network finds, and the lesion, all (1, 1, H, W, D).

    Attributes:
        plain, logit: of the scan, and of the average of scan and mirror image.
        voxel_ml: size of a voxel; 0 for scenes.
    """

    group: str
    scan: torch.Tensor
    brain: torch.Tensor
    plain: torch.Tensor
    logit: torch.Tensor
    lesion: torch.Tensor
    voxel_ml: float


def posterior(case: Case, **options) -> torch.Tensor:
    """The log-odds with the options of `add_brightness`; by default those of the rule before."""
    options = {"rounds": 2, "ordinary": 0.0, "nearby": False} | options
    return add_brightness(case.logit, case.scan, case.brain, **options)


def potts(log_odds: torch.Tensor) -> torch.Tensor:
    """Five mean-field iterations of a Potts model of strength 2 over the 26 neighbours."""
    out = log_odds
    for _ in range(5):
        out = log_odds + 2 * F.avg_pool3d(torch.tanh(out / 2), 3, stride=1, padding=1)
    return out


def hysteresis(log_odds: torch.Tensor, brain: torch.Tensor, low: float) -> torch.Tensor:
    """Voxels above `low` that are connected to a component above 0 of 0.3 % of the brain or more, bool."""
    core, weak = (((log_odds > level) & brain)[0, 0].numpy() for level in (0, low))
    components, count = ndimage.label(core)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    seeds = (sizes >= 0.003 * int(brain.sum()))[components]
    grown, count = ndimage.label(weak)
    kept = np.bincount(grown.ravel(), seeds.ravel(), minlength=count + 1) > 0
    kept[0] = False
    return torch.from_numpy(core | kept[grown])[None, None]


def share_of_scan(log_odds: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """A prior that grows with the share of lesion in the scan above 1 %, in three rounds, by at most 2."""
    out = log_odds
    for _ in range(3):
        out = log_odds + (out[brain].sigmoid().mean() / 0.01).log().clamp(0, 2)
    return out


def fill_holes(log_odds: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """What is found, and cavities that it encloses, bool."""
    return torch.from_numpy(ndimage.binary_fill_holes(((log_odds > 0) & brain)[0, 0].numpy()))[None, None]


RULES: dict[str, Callable[[Case], torch.Tensor]] = {
    BEFORE: lambda case: posterior(case),
    "scan, moments of the brain": lambda case: add_brightness(
        case.plain, case.scan, case.brain, rounds=0, nearby=False
    ),
    "mirror image, moments of the brain": lambda case: posterior(case, rounds=0),
    "mirror image, moments below 0, threshold 1.5": lambda case: posterior(case, threshold=1.5),
    "mirror image, moments below 0, Potts model": lambda case: potts(posterior(case)),
    "mirror image, moments below 0, holes filled": lambda case: fill_holes(posterior(case), case.brain),
    "mirror image, moments below 0, prior from the scan": lambda case: share_of_scan(posterior(case), case.brain),
    "mirror image, moments below 0, hysteresis from -1": lambda case: hysteresis(posterior(case), case.brain, -1),
    "mirror image, moments below 0, hysteresis from -2": lambda case: hysteresis(posterior(case), case.brain, -2),
    "mirror image, moments below -4": lambda case: posterior(case, rounds=4, ordinary=-4.0),
    NOW: lambda case: add_brightness(case.logit, case.scan, case.brain),
    f"{NOW}, hysteresis from -1": lambda case: hysteresis(
        add_brightness(case.logit, case.scan, case.brain), case.brain, -1
    ),
}


def make_case(network, group: str, scan, brain, lesion, voxel_ml: float = 0.0) -> Case:
    """Run the network on a scan and on its mirror image."""
    with torch.no_grad():
        soft, turned = (network.scaled_logits(x).softmax(dim=1).clamp(min=1e-9) for x in (scan, scan.flip(2)))
    logits = [(shares[:, 2:] / shares[:, 1:2]).log() for shares in (soft, (soft + turned.flip(2)) / 2)]
    return Case(group, scan, brain, *logits, lesion & brain, voxel_ml)


def cases(network, folder: Path) -> Iterator[Case]:
    """The MS scans, the same without their bright outliers, and scenes drawn from these."""
    healthy = []
    for path in sorted(p for p in folder.glob("*_flair.nii.gz") if not p.name.startswith("brats")):
        file = read_nifti(path)
        mask = read_nifti(Path(str(path).replace("_flair", "_lesion")), allow_constant=True).data > 0.5
        item = frame_scan(torch.from_numpy(file.data), network.config.frame)
        scan, brain = item["volume"][None], item["foreground"][None].bool()
        frame = Frame.around(find_foreground(torch.from_numpy(file.data)[None, None]), network.config.frame)
        lesion = frame.crop(torch.from_numpy(mask.astype(np.float32))[None, None]) > 0.5
        voxel_ml = float(np.prod(np.divide(frame.size, frame.grid)) * np.prod(file.spacing_mm)) / 1000
        yield make_case(network, "ms", scan, brain, lesion, voxel_ml)
        healthy.append((smooth_away(scan, brain, bright_outliers(scan, brain)), brain))
        yield make_case(network, "without_lesions", *healthy[-1], torch.zeros_like(brain), voxel_ml)
    for group, (count, first_seed, options) in SCENES.items():
        for number in range(count):
            tissue, brain = healthy[number % len(healthy)]
            generator = torch.Generator().manual_seed(first_seed + number)
            scene = draw_scene(tissue, brain.float(), torch.zeros_like(tissue), generator, options)
            lesion = (scene.conspicuous > 1) & scene.foreground
            large = lesion.sum() > LARGE * scene.foreground.sum()
            name = ("large_implants" if large else "small_implants") if group == "implants" else group
            yield make_case(network, name, scene.view, scene.foreground, lesion)


def compare(before: list[float], after: list[float]) -> dict[str, float]:
    """Mean difference over the same volumes, its standard error, and how many are better and worse by .001."""
    difference = np.subtract(after, before)
    error = difference.std(ddof=1) / len(difference) ** 0.5
    better, worse = int((difference > 1e-3).sum()), int((difference < -1e-3).sum())
    rounded = {"difference": round(float(difference.mean()), 4), "standard_error": round(float(error), 4)}
    return rounded | {"better": better, "worse": worse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="MS scans and masks of their lesions; names in `brats` are left out")
    arguments = parser.parse_args()
    values: dict[str, dict[str, list[float]]] = {name: {} for name in RULES}
    shares: dict[str, list[float]] = {}
    for case in cases(load_discovery("brain-flair").eval(), arguments.folder):
        healthy = case.group == "without_lesions"
        shares.setdefault(case.group, []).append(float(case.lesion.sum() / case.brain.sum()))
        for name, rule in RULES.items():
            found = rule(case)
            found = (found if found.dtype == torch.bool else found > 0) & case.brain
            score = float(found.sum()) * case.voxel_ml if healthy else binary_dice(found.numpy(), case.lesion.numpy())
            values[name].setdefault(f"{case.group}_{'ml' if healthy else 'dice'}", []).append(score)
    result = {
        "command": "python -m benchmarks.explorations.lesions FOLDER",
        "first_seeds": {group: seed for group, (_, seed, _) in SCENES.items()},
        "counts": {group: len(s) for group, s in shares.items()},
        "share_of_brain": {
            g: [round(min(s), 4), round(float(np.median(s)), 4), round(max(s), 4)] for g, s in shares.items()
        },
        "before": BEFORE,
        "now": NOW,
        "means": {n: {g: round(float(np.mean(v)), 4) for g, v in groups.items()} for n, groups in values.items()},
        "largest_without_lesions_ml": {n: round(max(g["without_lesions_ml"]), 2) for n, g in values.items()},
        "against_before": {
            name: {group: compare(values[BEFORE][group], scores) for group, scores in groups.items()}
            for name, groups in values.items()
            if name != BEFORE
        },
        "ms_dice": {name: [round(v, 3) for v in groups["ms_dice"]] for name, groups in values.items()},
        "environment": describe_environment(),
    }
    write_json(RESULTS / "lesions.json", result)
    for name, groups in result["means"].items():
        print(name, groups)


if __name__ == "__main__":
    main()

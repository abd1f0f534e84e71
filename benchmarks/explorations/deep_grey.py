"""Contrast of deep grey against white matter in FLAIR scans and in brain phantoms.

    python -m benchmarks.explorations.deep_grey FOLDER      (about one minute)

FOLDER holds scans `<case>_flair.nii.gz`; names in `brats` are left out. Without an atlas, tissue is taken from boxes in
the frame of a scan, which is right, anterior, superior: the thalami, putamina and the internal capsules in `DEEP`, the
centrum semiovale in `WHITE`, and the cortex 3 to 6 mm below the surface. Scans are smoothed with a Gaussian of one
voxel (1.5 mm). White matter is the most frequent intensity in its box, as lesions are bright there; fluid, below 0.6
times white matter, is left out. Values are relative to white matter: percentiles of the deep box, whose upper ones are
grey matter, and of the cortex. `deviations` are the upper ones in robust standard deviations above the median of the
brain, the unit of `brightness_evidence`.
Writes `results/deep-grey.json`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import gaussian_kde

from benchmarks import RESULTS
from diffdiscover3d.data.datasets.brain_phantom import brain_phantom
from diffdiscover3d.data.foreground import Frame, find_foreground
from diffdiscover3d.data.formats.nifti.reading import read_nifti
from diffdiscover3d.models.brightness import robust_moments
from diffdiscover3d.utils.files import write_json
from diffdiscover3d.utils.provenance import describe_environment

GRID = (96, 112, 96)
# lowest and highest distance from the middle, and coordinates to the front and up; half a frame is 1
DEEP = ((0.1, 0.45), (-0.12, 0.33), (-0.2, 0.1))
WHITE = ((0.2, 0.42), (-0.35, 0.35), (0.28, 0.5))
CORTEX = (2, 4)  # voxels of 1.5 mm below the surface of the brain
PERCENTILES = (25, 50, 75, 90, 95)
PHANTOMS = range(3, 40, 4)  # of every four, the last has no lesion


def measure(volume: np.ndarray) -> dict[str, float]:
    """Intensities of an (H, W, D) scan relative to its white matter.

    Raises:
        ValueError: if a box holds hardly any tissue.
    """
    whole = torch.from_numpy(volume.astype(np.float32))[None, None]
    foreground = find_foreground(whole)
    frame = Frame.around(foreground, GRID)
    brain = (frame.crop(foreground.float()) > 0.5)[0, 0].numpy()
    scan = ndimage.gaussian_filter(frame.crop(whole)[0, 0].numpy(), 1.0)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID], indexing="ij")

    def box(limits) -> np.ndarray:
        inside = [(low < c) & (c < high) for c, (low, high) in zip((np.abs(x), y, z), limits, strict=True)]
        return scan[np.logical_and.reduce([brain, *inside])]

    white = box(WHITE)
    if len(white) < 1000:
        raise ValueError(f"the box of white matter holds {len(white)} voxels of the brain; it must be a whole one.")
    white = mode(white)
    median, spread = (float(v) for v in robust_moments(torch.from_numpy(scan[brain])))
    depth = ndimage.distance_transform_edt(brain)
    row = {}
    for name, values in (("deep", box(DEEP)), ("cortex", scan[(depth > CORTEX[0]) & (depth <= CORTEX[1])])):
        values = values[values > 0.6 * white]
        for percentile in PERCENTILES:
            row[f"{name}_p{percentile}"] = float(np.percentile(values, percentile)) / white
        row[f"{name}_deviations_p95"] = (float(np.percentile(values, 95)) - median) / spread
    return {key: round(value, 3) for key, value in row.items()}


def mode(values: np.ndarray) -> float:
    """The most frequent value: the peak of a Gaussian kernel density estimate, at one of 256 levels."""
    levels = np.linspace(*np.percentile(values, (1, 99)), 256)
    return float(levels[gaussian_kde(values[:: max(1, len(values) // 5000)])(levels).argmax()])


def summarise(rows: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """Lowest, mean and highest value of each measurement."""
    keys = next(iter(rows.values()))
    values = {key: [row[key] for row in rows.values()] for key in keys}
    return {key: [min(v), round(float(np.mean(v)), 3), max(v)] for key, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="brain-extracted FLAIR scans; names in `brats` are left out")
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.folder.glob("*_flair.nii.gz") if not p.name.startswith("brats"))
    groups = {
        "scans": {path.name.removesuffix("_flair.nii.gz"): measure(read_nifti(path).data) for path in paths},
        "phantoms": {f"test-{index:03d}": measure(brain_phantom("test", index).volume) for index in PHANTOMS},
    }
    summary = {name: summarise(rows) for name, rows in groups.items()}
    result = {
        "command": "python -m benchmarks.explorations.deep_grey FOLDER",
        "lowest_mean_highest": summary,
        **groups,
        "environment": describe_environment(),
    }
    write_json(RESULTS / "deep-grey.json", result)
    for key in summary["scans"]:
        print(f"{key:24}", *(f"{name} {row[key]}" for name, row in summary.items()))


if __name__ == "__main__":
    main()

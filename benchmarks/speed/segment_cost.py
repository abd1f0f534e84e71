"""What `diffdiscover3d segment` costs: a brain scan from the command line, and the cost of a voxel by volume size.

    python -m benchmarks.speed.segment_cost

Each run is a process of its own, as a user starts it: imports, loading the model, reading, dividing, writing. The scan
is 240x240x155, int16, compressed, made here; the runs of all shapes take turns. What a voxel costs is the seconds
beyond those of the smallest volume, whose run is next to nothing but imports.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.speed.timing import Benchmark, absolute

BRAIN = (240, 240, 155)
SHAPES = [(16, 16, 16), (48, 48, 48), (64, 96, 80), (96, 96, 96), (160, 128, 96), (192, 192, 40), (160, 160, 160)]
SHAPES += [(240, 240, 240), BRAIN]
QUICK = [(16, 16, 16), (32, 48, 40), (64, 64, 48)]
# started by a process that is small itself: on Linux a child's recorded peak begins with that of its parent
LAUNCHER = """
import json, resource, subprocess, sys, time
clock = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds, used = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9  # Linux counts in KiB
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_gb": peak}))
sys.exit(code)
"""
TARGETS = {"seconds": 25.0, "peak_gb": 3.0}  # of the brain scan


def write_scan(path: Path, shape: tuple[int, int, int], seed: int) -> None:
    """A noisy ellipsoid with a brighter ball in it on a dark background, int16, as scanners write."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True)
    radius = np.sqrt(sum(a**2 for a in axes))
    data = 400 * (radius < 0.8) + 500 * (radius < 0.3) + rng.normal(0, 40, shape).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.clip(data, 0, 2000).astype(np.int16), np.diag([1, 1, 1.2, 1])), path)


def run_segment(scan: Path, output: Path, device: str) -> dict:
    """Wall seconds and peak memory of the command in a process of its own."""
    command = [sys.executable, "-m", "diffdiscover3d.cli", "segment", str(scan), "-o", str(output)]
    launch = [sys.executable, "-c", LAUNCHER, *command, "--device", device, "--overwrite"]
    done = subprocess.run(launch, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """All shapes in turns; the brain scan's medians against their targets."""
    benchmark = Benchmark("segment-cost", __doc__)
    options = benchmark.parse()
    shapes = QUICK if options.quick else SHAPES
    rounds = options.rounds or (1 if options.quick else 3)
    runs: dict[tuple, list[dict]] = {shape: [] for shape in shapes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in shapes:
            write_scan(folder / f"{'x'.join(map(str, shape))}.nii.gz", shape, options.seed)
        for _ in range(rounds):
            for shape in shapes:
                scan = folder / f"{'x'.join(map(str, shape))}.nii.gz"
                runs[shape].append(run_segment(scan, folder / "out", options.device))
                print(shape, runs[shape][-1], flush=True)
    medians = {
        shape: {key: float(np.median([run[key] for run in found])) for key in found[0]} for shape, found in runs.items()
    }
    start = medians[shapes[0]]["seconds"]
    costs = []
    for shape in shapes:
        voxels, median = int(np.prod(shape)), medians[shape]
        beyond = (median["seconds"] - start) / voxels * 1e9 if shape != shapes[0] else None
        costs.append({"shape": shape, "voxels": voxels, **median, "ns_per_voxel": beyond, "runs": runs[shape]})
    largest = BRAIN if BRAIN in runs else shapes[-1]
    what = f"segment {'x'.join(map(str, largest))} int16 .nii.gz, model load included"
    targets = TARGETS if largest == BRAIN else dict.fromkeys(TARGETS)
    rows = [
        absolute(what, "s", [run["seconds"] for run in runs[largest]], targets["seconds"]),
        absolute(what, "GB", [run["peak_gb"] for run in runs[largest]], targets["peak_gb"]),
    ]
    benchmark.write(rows, {"rounds": rounds, "model": "the default, level 2"}, costs=costs)


if __name__ == "__main__":
    main()
